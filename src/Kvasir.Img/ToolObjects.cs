using System;
using System.Collections.Generic;
using System.IO;
using System.Security.Cryptography;
using System.Text;
using Kvasir.Block;
using Kvasir.Block.Filters;
using Kvasir.Block.Nbd;

namespace Kvasir.Img;

/// <summary>What --object options define: passphrases (secret), TLS certificates (tls-creds-x509) and rate limits (throttle-group), by their ids.</summary>
internal sealed class ToolObjects
{
    private const int LongestSecret = 8 << 20;

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
                Know(options, "endpoint", "dir", "verify-peer");
                bool isServer = options["endpoint"] switch
                {
                    "server" => true,
                    null or "client" => false,
                    string other => throw new BlockException($"Invalid parameter '{other}'"),
                };
                _credentials[id] = TlsCredentials.Load(options["dir"] ?? throw new BlockException("Parameter 'dir' is missing"), isServer, options.Flag("verify-peer", true));
                break;
            case "throttle-group":
                foreach (string key in options.Values.Keys)
                {
                    if (key is not ("id" or "qom-type") && !((key.StartsWith("x-", StringComparison.Ordinal) || key.StartsWith("limits.", StringComparison.Ordinal)) && ThrottleLimits.IsOption(key)))
                        throw new BlockException($"Parameter '{key}' is unexpected");
                }
                _groups[id] = new ThrottleGroup(ThrottleLimits.FromOptions(options));
                break;
            default:
                throw new BlockException($"Invalid parameter '{options["qom-type"]}': only 'secret', 'tls-creds-x509' and 'throttle-group' objects are known");
        }
    }

    /// <summary>A passphrase: as it is, in base64, or encrypted with another one (AES-256 in CBC mode), as management programs hand theirs over.</summary>
    private byte[] Secret(ImageOptions options)
    {
        Know(options, "format", "data", "file", "keyid", "iv");
        if (options["file"] is not null && options["data"] is not null)
            throw new BlockException("'file' and 'data' are mutually exclusive");
        byte[] data = options["file"] is string file ? Read(file) : Encoding.UTF8.GetBytes(options["data"] ?? throw new BlockException("Either 'file' or 'data' must be provided"));
        if (options["format"] is not (null or "raw" or "base64"))
            throw new BlockException($"Parameter 'format' does not accept value '{options["format"]}'");
        if (options["format"] == "base64")
            data = FromBase64(Encoding.Latin1.GetString(data));
        return options["keyid"] is string key ? Decrypt(data, key, options["iv"]) : data;
    }

    private byte[] Decrypt(byte[] data, string keyId, string? vector)
    {
        if (!_secrets.TryGetValue(keyId, out ReadOnlyMemory<byte> key))
            throw new BlockException($"No secret with id '{keyId}'", BlockErrno.NoEntry);
        if (key.Length != 32)
            throw new BlockException($"Key should be 32 bytes in length, and the secret '{keyId}' has {key.Length}");
        byte[] iv = FromBase64(vector ?? throw new BlockException("IV is required to decrypt secret"));
        if (iv.Length != 16)
            throw new BlockException($"IV should be 16 bytes in length not {iv.Length}");
        try
        {
            using Aes aes = Aes.Create();
            aes.SetKey(key.Span);
            return aes.DecryptCbc(data, iv);
        }
        catch (CryptographicException)
        {
            // What the library says may tell of the content.
            throw new BlockException($"The secret cannot be decrypted with '{keyId}'");
        }
    }

    private static byte[] Read(string file)
    {
        try
        {
            using FileStream stream = File.OpenRead(file);
            using MemoryStream content = new();
            byte[] part = new byte[4096];
            for (int length; (length = stream.Read(part)) > 0;)
            {
                content.Write(part, 0, length);
                if (content.Length > LongestSecret)
                    throw new BlockException($"Unable to read {file}: a secret has at most {LongestSecret} bytes");
            }
            return content.ToArray();
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw new BlockException($"Unable to read {file}: {error.Message}", error);
        }
    }

    private static byte[] FromBase64(string text)
    {
        try
        {
            return Convert.FromBase64String(text.Trim());
        }
        catch (FormatException)
        {
            throw new BlockException("Base64 data is not valid");
        }
    }

    private static void Know(ImageOptions options, params string[] names)
    {
        foreach (string key in options.Values.Keys)
        {
            if (key is not ("id" or "qom-type") && Array.IndexOf(names, key) < 0)
                throw new BlockException($"Parameter '{key}' is unexpected");
        }
    }
}
