using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using System.Text;
using Iced.Intel;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>Runs cases on both processors, batch by batch, and collects what differs.</summary>
internal sealed unsafe class Campaign : IDisposable
{
    private readonly SharedArea _area = new();
    private readonly NativeRunner _native;
    private readonly ICaseRunner _soft;
    private readonly CaseGenerator _generator;
    private readonly OracleRecord* _outcome;
    private readonly (Form Form, ulong Index, Latitude Latitude)[] _cases = new (Form, ulong, Latitude)[SharedArea.Batch];
    private readonly Dictionary<(Form Form, string Kind), FormFailure> _failures = [];
    private readonly HashSet<Form> _seen = [];

    /// <summary>Where the case under way is written, for a crash of this process to be traced to it.</summary>
    private readonly FileStream? _trace;
    private readonly CaseFilter? _leavesOut;

    /// <param name="seed">Of every case.</param>
    /// <param name="runner">Makes the processor that is compared with the host's, from the window's pristine contents.</param>
    /// <param name="trace">A file that gets the case that the processor is at; null: none.</param>
    /// <param name="leavesOut">Whether a case that the host ran is none for the processor; null: all are.</param>
    public Campaign(ulong seed, Func<SharedArea, ICaseRunner> runner, string? trace = null, CaseFilter? leavesOut = null)
    {
        Seed = seed;
        _leavesOut = leavesOut;
        _trace = string.IsNullOrEmpty(trace) ? null : new FileStream(trace, FileMode.Create, FileAccess.Write, FileShare.Read, 0);
        _native = NativeRunner.Create(_area);
        _soft = runner(_area);
        _generator = new CaseGenerator(_soft.IsAmd);
        _outcome = (OracleRecord*)NativeMemory.AllocZeroed((nuint)sizeof(OracleRecord));
    }

    public ulong Seed { get; }

    /// <summary>Cases that both processors ran.</summary>
    public long Judged { get; private set; }

    /// <summary>Of those, cases that ended in an exception.</summary>
    public long Faulted { get; private set; }

    /// <summary>Cases left out: outside the window, without end, or none for the processor.</summary>
    public long Unfair { get; private set; }

    public IReadOnlyCollection<FormFailure> Failures => _failures.Values;

    /// <summary>Runs <paramref name="cases"/> cases of every form.</summary>
    public void Run(IReadOnlyList<Form> forms, int cases)
    {
        int count = 0;
        foreach (Form form in forms)
        {
            for (ulong index = 0; index < (ulong)cases; index++)
            {
                if (!TryPrepare(form, index, count))
                    continue;
                if (++count < SharedArea.Batch)
                    continue;
                RunBatch(count);
                count = 0;
            }
        }
        RunBatch(count);
        foreach (Form form in forms)
        {
            if (!_seen.Contains(form))
                Note(form, 0, "    no case of it could be made\n");
        }
    }

    /// <summary>Runs every batch twice on the host: it must agree with itself, or the helper leaks state from case to case.</summary>
    public void RunHostTwice(IReadOnlyList<Form> forms)
    {
        int count = 0;
        for (int i = 0; i < forms.Count; i++)
        {
            if (TryPrepare(forms[i], 0, count))
                count++;
            if (count < SharedArea.Batch && i + 1 < forms.Count)
                continue;
            _native.Run(count);
            OracleRecord[] first = new OracleRecord[count];
            for (int k = 0; k < count; k++)
                first[k] = *_area.Record(k);
            _native.Run(count);
            for (int k = 0; k < count; k++)
            {
                fixed (OracleRecord* before = &first[k])
                {
                    List<string> differences = Judge.Compare(before, _area.Record(k), default);
                    Judged++;
                    if (differences.Count > 0)
                        Note(_cases[k].Form, _cases[k].Index, Report(_area.Record(k), differences));
                }
            }
            count = 0;
        }
    }

    /// <summary>One case, with all that is known of it.</summary>
    public string Replay(Form form, ulong index)
    {
        if (!TryPrepare(form, index, 0))
            return "no such case";
        OracleRecord* record = _area.Record(0);
        _native.Run(1);
        ulong hash = record->Hash;
        Judge.Normalize(record, record->In.Rip);
        Execute(record, 0);
        Judge.Normalize(_outcome, record->In.Rip);
        List<string> differences = Judge.Compare(record, _outcome, _cases[0].Latitude);
        StringBuilder text = new(Report(record, differences));
        if (hash != _outcome->Hash)
            text.Append(CompareWindows(record));
        return text.ToString();
    }

    /// <summary>All failures, for a person.</summary>
    public string Summary(int limit)
    {
        StringBuilder text = new();
        text.Append(CultureInfo.InvariantCulture, $"seed {Seed}: {Judged} cases judged, {Faulted} of them faults, {Unfair} left out; ");
        text.Append(CultureInfo.InvariantCulture, $"{_failures.Count} forms differ in {_failures.Values.Sum(f => f.Count)} cases\n");
        foreach (FormFailure failure in _failures.Values.Take(limit))
        {
            text.Append(CultureInfo.InvariantCulture, $"{failure.Form}: {failure.Count} cases; KVASIR_ORACLE_REPLAY={failure.Form}/{Seed}/{failure.FirstIndex}\n");
            text.Append(failure.First);
        }
        if (_failures.Count > limit)
            text.Append("also: ").AppendJoin(", ", _failures.Values.Skip(limit).Select(f => f.Form)).Append('\n');
        return text.ToString();
    }

    public void Dispose()
    {
        _trace?.Dispose();
        _native.Dispose();
        _soft.Dispose();
        _area.Dispose();
        NativeMemory.Free(_outcome);
    }

    private bool TryPrepare(Form form, ulong index, int slot)
    {
        if (form.IsBlock)
        {
            _generator.MakeBlock(form.Mode, Seed, index, _area.Record(slot), out Latitude open);
            _cases[slot] = (form, index, open);
            _seen.Add(form);
            return true;
        }
        bool made = _generator.TryMake(form, Seed, index, _area.Record(slot));
        if (_generator.IsEncodable)
            _seen.Add(form);
        if (!made)
            return false;
        Instruction instruction = _generator.Instruction;
        _cases[slot] = (form, index, Latitude.Of(in instruction, &_area.Record(slot)->In));
        return true;
    }

    private void RunBatch(int count)
    {
        if (count == 0)
            return;
        int start = 0;
        while (true)
        {
            try
            {
                _native.Run(count);
                break;
            }
            catch (HelperFailedException e) when (start++ < 5)
            {
                // The case that ended the helper is reported and made harmless; the others still count.
                OracleRecord* record = _area.Record(e.Record);
                Note(_cases[e.Record].Form, _cases[e.Record].Index, $"    {e.Message}\n{Report(record, [])}");
                record->CodeLength = 0;
            }
        }
        for (int i = 0; i < count; i++)
        {
            OracleRecord* record = _area.Record(i);
            if (record->CodeLength != 0)
                JudgeCase(record, i);
        }
    }

    private void JudgeCase(OracleRecord* record, int slot)
    {
        Judge.Normalize(record, record->In.Rip);
        if (_leavesOut?.Invoke(record) == true)
        {
            Unfair++;
            return;
        }
        Trace(slot);
        Execute(record, slot);
        Judge.Normalize(_outcome, record->In.Rip);
        if (!Judge.IsFair(record, _outcome))
        {
            Unfair++;
            return;
        }
        Judged++;
        if (record->Vector != OracleRecord.NoVector)
            Faulted++;
        List<string> differences = Judge.Compare(record, _outcome, _cases[slot].Latitude);
        if (differences.Count > 0)
            Note(_cases[slot].Form, _cases[slot].Index, Report(record, differences), differences);
    }

    private void Execute(OracleRecord* record, int slot, bool keepWindow = false)
    {
        if (_cases[slot].Form.IsBlock)
            _soft.RunBlock(record, _outcome, keepWindow);
        else
            _soft.Step(record, _outcome, keepWindow);
    }

    private void Trace(int slot)
    {
        if (_trace == null)
            return;
        _trace.Position = 0;
        _trace.Write(Encoding.ASCII.GetBytes($"{_cases[slot].Form}/{Seed}/{_cases[slot].Index}".PadRight(100) + "\n"));
    }

    /// <summary>Keeps the first failure of a form; of blocks, the first of each set of things that differ.</summary>
    private void Note(Form form, ulong index, string report, IEnumerable<string>? differences = null)
    {
        string kind = form.IsBlock && differences != null ? string.Join(' ', differences.Select(d => d.Split(':')[0])) : "";
        if (_failures.TryGetValue((form, kind), out FormFailure? failure))
            failure.Count++;
        else
            _failures[(form, kind)] = new FormFailure(form, index, report);
    }

    private string Report(OracleRecord* record, List<string> differences)
    {
        int mode = (int)record->Mode;
        StringBuilder text = new(Judge.Describe(record, at =>
            _generator.Decode(mode, new ReadOnlySpan<byte>(record->Code + at, (int)record->CodeLength - at), record->In.Rip + (ulong)at)));
        foreach (string difference in differences)
            text.Append(CultureInfo.InvariantCulture, $"      {difference}\n");
        return text.ToString();
    }

    private string CompareWindows(OracleRecord* record)
    {
        _native.Run(1, keepWindow: true);
        Execute(record, 0, keepWindow: true);
        StringBuilder text = new();
        for (int at = 0x2000; at < Window.Size; at++)
        {
            byte host = _area.HostWindow[at];
            byte soft = _soft.WindowBytes[at];
            if (host != soft)
                text.Append(CultureInfo.InvariantCulture, $"      [{Window.Start + at:x}]: was {_area.Pristine[at]:x2}, host {host:x2}, soft {soft:x2}\n");
        }
        _soft.Clean();
        return text.ToString();
    }
}

/// <summary>Says something of a case, its outcome on the host included.</summary>
internal unsafe delegate bool CaseFilter(OracleRecord* record);

/// <summary>A form on which the processors differ.</summary>
internal sealed class FormFailure(Form form, ulong index, string report)
{
    public Form Form { get; } = form;

    public int Count { get; set; } = 1;

    public ulong FirstIndex { get; } = index;

    /// <summary>The first case.</summary>
    public string First { get; } = report;
}
