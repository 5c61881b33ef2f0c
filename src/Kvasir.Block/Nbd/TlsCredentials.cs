using System;
using System.IO;
using System.Net.Security;
using System.Security.Cryptography;
using System.Security.Cryptography.X509Certificates;

namespace Kvasir.Block.Nbd;

/// <summary>
/// Certificates of one end of an NBD connection, from a folder with the names that QEMU gives them: ca-cert.pem, and server-cert.pem with
/// server-key.pem or client-cert.pem with client-key.pem (which a client may lack).
/// </summary>
public sealed class TlsCredentials : IDisposable
{
    private readonly X509Certificate2Collection _authorities;
    private readonly X509Certificate2? _own;
    private readonly bool _verifyPeer;

    private TlsCredentials(X509Certificate2Collection authorities, X509Certificate2? own, bool isServer, bool verifyPeer)
    {
        _authorities = authorities;
        _own = own;
        IsServer = isServer;
        _verifyPeer = verifyPeer;
    }

    public bool IsServer { get; }

    /// <summary>Reads the folder.</summary>
    /// <param name="folder">Where the files lie.</param>
    /// <param name="isServer">Which of the two ends.</param>
    /// <param name="verifyPeer">Whether the other end's certificate must be the authority's.</param>
    /// <exception cref="BlockException">A file is missing or is no certificate.</exception>
    public static TlsCredentials Load(string folder, bool isServer, bool verifyPeer)
    {
        string name = isServer ? "server" : "client";
        string certificate = Path.Combine(folder, name + "-cert.pem");
        string authority = Path.Combine(folder, "ca-cert.pem");
        try
        {
            X509Certificate2Collection authorities = [];
            if (File.Exists(authority))
                authorities.ImportFromPemFile(authority);
            else if (verifyPeer || !isServer)
                throw new BlockException($"Unable to access credentials {authority}: {BlockException.Text(BlockErrno.NoEntry)}", BlockErrno.NoEntry);
            X509Certificate2? own = null;
            if (isServer || File.Exists(certificate))
                own = X509Certificate2.CreateFromPemFile(certificate, Path.Combine(folder, name + "-key.pem"));
            return new TlsCredentials(authorities, own, isServer, verifyPeer);
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException or CryptographicException)
        {
            throw new BlockException($"Unable to load the TLS credentials in {folder}: {error.Message}", error);
        }
    }

    public void Dispose() => _own?.Dispose();

    internal SslServerAuthenticationOptions ServerOptions() => new()
    {
        ServerCertificate = _own,
        ClientCertificateRequired = _verifyPeer,
        CertificateChainPolicy = Policy(),
        RemoteCertificateValidationCallback = (_, certificate, _, errors) => !_verifyPeer || (certificate is not null && errors == SslPolicyErrors.None),
    };

    internal SslClientAuthenticationOptions ClientOptions(string host) => new()
    {
        TargetHost = host,
        ClientCertificates = _own is null ? null : [_own],
        CertificateChainPolicy = Policy(),
        // A socket of this host has no name that a certificate could be for: there the authority alone counts.
        RemoteCertificateValidationCallback = (_, certificate, _, errors) =>
            !_verifyPeer || (certificate is not null && (host.Length == 0 ? errors & ~SslPolicyErrors.RemoteCertificateNameMismatch : errors) == SslPolicyErrors.None),
    };

    /// <summary>The folder's authorities and no others; nothing is fetched from places that a stranger's certificate names.</summary>
    private X509ChainPolicy Policy()
    {
        X509ChainPolicy policy = new()
        {
            TrustMode = X509ChainTrustMode.CustomRootTrust,
            RevocationMode = X509RevocationMode.NoCheck,
            DisableCertificateDownloads = true,
        };
        policy.CustomTrustStore.AddRange(_authorities);
        return policy;
    }
}
