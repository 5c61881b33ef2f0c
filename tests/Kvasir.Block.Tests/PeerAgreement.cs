using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text.Json.Nodes;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>The same question to QEMU's tool and to ours: code and answer must be the same.</summary>
internal static class PeerAgreement
{
    /// <summary>A number from the environment, for runs that are longer than the suite's.</summary>
    public static int Setting(string name, int fallback) =>
        int.TryParse(Environment.GetEnvironmentVariable(name), NumberStyles.None, CultureInfo.InvariantCulture, out int value) ? value : fallback;

    public static async Task<(int Code, string Text)> AgreeAsync(params string[] args)
    {
        (int code, string text) = await Peer.RunAsync("qemu-img", args);
        (int own, string ownText) = await Peer.ImgAsync(args);
        bool same = code == own && (text == ownText || (args[0] is "check" or "info" && SameJson(text, ownText)));
        Assert.True(same, $"{string.Join(' ', args)}: QEMU {code}, own {own}\n--- QEMU\n{text}\n--- own\n{ownText}");
        return (code, text);
    }

    // The order of an object's members says nothing.
    private static bool SameJson(string a, string b) =>
        a.Contains("\n}", StringComparison.Ordinal) && b.Contains("\n}", StringComparison.Ordinal) && JsonNode.DeepEquals(JsonNode.Parse(Json(a)), JsonNode.Parse(Json(b)))
        && Messages(a).SetEquals(Messages(b));

    private static string Json(string text) => text[text.IndexOf('{', StringComparison.Ordinal)..(text.LastIndexOf("\n}", StringComparison.Ordinal) + 2)];

    // What was found, in any order: one program says it before, the other after it has looked at all.
    private static HashSet<string> Messages(string text) => [.. text.Replace(Json(text), string.Empty, StringComparison.Ordinal).Split('\n', StringSplitOptions.RemoveEmptyEntries)];
}
