using System.Linq;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Qcow2;

namespace Kvasir.Img;

/// <summary>The -l option: an internal snapshot by id or name, or by "snapshot.id=ID,snapshot.name=NAME".</summary>
internal static class SnapshotView
{
    /// <summary>A read-only view of the snapshot, which borrows the image.</summary>
    /// <exception cref="BlockException">There is no such snapshot, or no such parameter.</exception>
    public static async ValueTask<BlockNode> OpenAsync(BlockNode source, string parameter)
    {
        if (source is not Qcow2Image image)
            throw new BlockException($"Failed to load snapshot: Block format '{source.Driver}' used by device '' does not support temporarily loading internal snapshots");
        Qcow2Snapshot? snapshot;
        if (parameter.StartsWith("snapshot.", System.StringComparison.Ordinal))
        {
            ImageOptions options = ImageOptions.ParseList(parameter);
            string? unknown = options.Values.Keys.FirstOrDefault(k => k is not ("snapshot.id" or "snapshot.name"));
            if (unknown is not null)
                throw new BlockException($"Invalid parameter '{unknown}'");
            (string? id, string? name) = (options["snapshot.id"], options["snapshot.name"]);
            snapshot = image.Snapshots.FirstOrDefault(s => (id is null || s.Id == id) && (name is null || s.Name == name));
        }
        else
        {
            snapshot = image.FindSnapshot(parameter);
        }
        return await image.OpenSnapshotAsync(snapshot ?? throw new BlockException("Failed to load snapshot: Can't find snapshot")).ConfigureAwait(false);
    }
}
