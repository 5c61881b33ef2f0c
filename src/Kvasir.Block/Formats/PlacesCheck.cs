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
        Occupation occupation = new(image, result);
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
            occupation.Count(offset, status);
            offset += Math.Max(1, status.Length);
        }
        if (image is ParallelsImage)
            result.ImageEndOffset = Math.Max(end, file.Length);
        return result;
    }

    /// <summary>How much of an image is allocated, and how many pieces of it do not follow the one before, as QEMU's tool counts them for these formats.</summary>
    private sealed class Occupation
    {
        private readonly BlockNode _image;
        private readonly CheckResult _result;
        private readonly long _unit;

        // Where the next piece would follow; 0: anything does.
        private long _next;

        public Occupation(BlockNode image, CheckResult result)
        {
            _image = image;
            _result = result;
            (_unit, result.TotalClusters) = image switch
            {
                QedImage qed => (qed.ClusterSize, (qed.Length + qed.ClusterSize - 1) / qed.ClusterSize),
                ParallelsImage parallels => (parallels.UnitSize, parallels.Units),
                _ => (0L, 0L),
            };
        }

        public void Count(long offset, BlockStatus status)
        {
            if (_unit == 0)
                return;
            // One file has its pieces counted anew behind a hole, the other behind a table.
            if (_image is QedImage qed && offset % qed.TableSpan == 0)
                _next = 0;
            if (status is { IsData: true, HasOffset: true })
            {
                long units = (status.Length + _unit - 1) / _unit;
                _result.AllocatedClusters += units;
                _result.FragmentedClusters += _next != 0 && _next != status.HostOffset ? 1 : 0;
                _next = status.HostOffset + (units * _unit);
            }
            else if (_image is ParallelsImage)
            {
                _next = 0;
            }
        }
    }
}
