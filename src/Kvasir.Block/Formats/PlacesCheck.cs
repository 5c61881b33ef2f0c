using System;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Qcow2;

namespace Kvasir.Block.Formats;

/// <summary>
/// The check of the formats without reference counts: headers and tables were judged when the image was opened; here every piece of the
/// disk that has a place in the file must lie inside it.
/// </summary>
public static class PlacesCheck
{
    /// <summary>Whether a format can be checked this way.</summary>
    public static bool Supports(BlockNode image) => image is VmdkImage or VhdxImage or VdiImage or QedImage or ParallelsImage;

    /// <param name="image">The image, open and at rest.</param>
    /// <param name="report">Gets a line for each finding.</param>
    /// <param name="cancellation">Ends the check early.</param>
    public static async ValueTask<CheckResult> RunAsync(BlockNode image, Action<string>? report, CancellationToken cancellation = default)
    {
        CheckResult result = new();
        if (image.File is not BlockNode file)
            return result;
        long end = 0;
        for (long offset = 0; offset < image.Length;)
        {
            BlockStatus status;
            try
            {
                status = await image.StatusAsync(offset, image.Length - offset, cancellation).ConfigureAwait(false);
            }
            catch (BlockException error)
            {
                report?.Invoke($"ERROR at 0x{offset:x}: {error.Message}");
                result.Corruptions++;
                break;
            }
            // The last block may be longer than what is left of the disk.
            BlockNode holder = image.DataFileAt(offset) ?? file;
            if (status is { IsData: true, HasOffset: true } && status.HostOffset + status.Length > holder.Length)
            {
                report?.Invoke($"ERROR {status.Length} bytes of the disk at 0x{offset:x} lie at 0x{status.HostOffset:x}, outside the file");
                result.Corruptions++;
            }
            if (status.HasOffset && ReferenceEquals(holder, file))
                end = Math.Max(end, status.HostOffset + status.Length);
            offset += Math.Max(1, status.Length);
        }
        if (image is QedImage qed)
            result.TotalClusters = (qed.Length + qed.ClusterSize - 1) / qed.ClusterSize;
        if (image is ParallelsImage)
            result.ImageEndOffset = Math.Max(end, file.Length);
        return result;
    }
}
