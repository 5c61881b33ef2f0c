using System;
using System.Collections.Generic;
using System.IO;
using System.Text;
using Kvasir.Block;
using Kvasir.Block.Filters;
using Kvasir.Block.Nbd;

namespace Kvasir.Img;

/// <summary>What --object options define: passphrases (secret), TLS certificates (tls-creds-x509) and rate limits (throttle-group), by their ids.</summary>
internal sealed class ToolObjects
{
    private readonly Dictionary<string, ReadOnlyMemory<byte>> _secrets = new(StringComparer.Ordinal);
    private readonly Dictionary<string, TlsCredentials> _credentials = new(StringComparer.Ordinal);

    private readonly Dictionary<string, ThrottleGroup> _groups = new(StringComparer.Ordinal);

    public IReadOnlyDictionary<string, ReadOnlyMemory<byte>> Secrets => _secrets;

    public IReadOnlyDictionary<string, TlsCredentials> Credentials => _credentials;

    public IReadOnlyDictionary<string, ThrottleGroup> ThrottleGroups => _groups;

    /// <summary>Takes in one option's value.</summary>
    /// <exception cref="BlockException">It is of an unknown kind or lacks something.</exception>
    public void Add(string definition)
    {
        ImageOptions options = definition.StartsWith('{') ? ImageOptions.ParseJson(definition) : ImageOptions.ParseList(definition, "qom-type");
        string id = options["id"] ?? throw new BlockException("Parameter 'id' is missing");
        switch (options["qom-type"])
        {
            case "secret":
                _secrets[id] = Secret(options);
                break;
            case "tls-creds-x509":
                bool isServer = options["endpoint"] switch
                {
                    "server" => true,
                    null or "client" => false,
                    string other => throw new BlockException($"Invalid parameter '{other}'"),
                };
                _credentials[id] = TlsCredentials.Load(options["dir"] ?? throw new BlockException("Parameter 'dir' is missing"), isServer, options.Flag("verify-peer", true));
                break;
            case "throttle-group":
                _groups[id] = new ThrottleGroup(ThrottleLimits.FromOptions(options));
                break;
            default:
                throw new BlockException($"Invalid parameter '{options["qom-type"]}': only 'secret', 'tls-creds-x509' and 'throttle-group' objects are known");
        }
    }

    private static byte[] Secret(ImageOptions options)
    {
        byte[] data = options["file"] is string file
            ? File.ReadAllBytes(file)
            : Encoding.UTF8.GetBytes(options["data"] ?? throw new BlockException("Either 'file' or 'data' must be provided"));
        return options["format"] switch
        {
            null or "raw" => data,
            "base64" => Convert.FromBase64String(Encoding.ASCII.GetString(data).Trim()),
            string other => throw new BlockException($"Invalid parameter '{other}'"),
        };
    }
}
