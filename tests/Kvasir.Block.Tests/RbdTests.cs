using System;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Images of a Ceph cluster: their names, and librbd's answers where there is no cluster.</summary>
public sealed class RbdTests
{
    [Fact]
    public void Names_are_taken_apart()
    {
        RbdNode.Address address = RbdNode.Address.Parse(@"rbd:pool/space/disk\:1@snap:id=admin:conf=/etc/ceph/a\:b.conf:mon_host=10.0.0.1\:6789,10.0.0.2\:6789");
        Assert.Equal(("pool", "space", "disk:1", "snap", "admin", "/etc/ceph/a:b.conf"), (address.Pool, address.Namespace, address.Image, address.Snapshot, address.User, address.Configuration));
        Assert.Equal("10.0.0.1:6789,10.0.0.2:6789", address.Settings["mon_host"]);
        Assert.Single(address.Settings);
        string name = RbdNode.Address.Name(ImageOptions.ParseList("pool=p/q,image=i@j,snapshot=s,user=u,server.0.host=10.0.0.1,server.0.port=3300,server.1.host=b"));
        Assert.Equal(@"rbd:p\/q/i\@j@s:id=u:mon_host=10.0.0.1\:3300,b\:6789", name);
        RbdNode.Address again = RbdNode.Address.Parse(name);
        Assert.Equal(("p/q", "i@j", "s", "u", "10.0.0.1:3300,b:6789"), (again.Pool, again.Image, again.Snapshot, again.User, again.Settings["mon_host"]));
    }

    [Theory]
    [InlineData("rbd:disk", "Pool name and image name are required")]
    [InlineData("rbd:/disk", "Pool name and image name are required")]
    [InlineData("rbd:pool/disk:conf", "conf option conf has no value")]
    public async Task Wrong_names_are_refused(string name, string reason)
    {
        (int code, string text) = await Peer.ImgAsync("info", name);
        Assert.True(code == 1 && text.Contains(reason, StringComparison.Ordinal), text);
    }

    [Fact]
    public async Task Without_a_cluster_the_library_says_so()
    {
        if (!Kvasir.Linux.Librbd.IsPresent)
            Assert.Skip("librbd is not installed");
        (int code, string text) = await Peer.ImgAsync("info", "rbd:pool/disk:conf=/nonexistent/ceph.conf");
        Assert.True(code == 1 && text.Contains("error reading conf file /nonexistent/ceph.conf: No such file", StringComparison.Ordinal), text);
        (code, text) = await Peer.ImgAsync("info", "rbd:pool/disk:no_such_setting=1");
        Assert.True(code == 1 && text.Contains("invalid conf option no_such_setting", StringComparison.Ordinal), text);
        // The discard port: nothing listens, and the library is told not to wait for minutes.
        (code, text) = await Peer.ImgAsync("info", "rbd:pool/disk:mon_host=127.0.0.1\\:9:client_mount_timeout=1:keyring=/dev/null:auth_client_required=none");
        Assert.True(code == 1 && text.Contains("error connecting: ", StringComparison.Ordinal), text);
    }
}
