using System;
using Kvasir.Core;
using Kvasir.Linux;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>x87, MMX, SSE and AVX state of a vCPU, and its floating-point error pins.</summary>
public sealed unsafe class VectorUnit
{
    // Wiring
    private readonly VcpuBlock* _s;

    // State
    private bool _ferr;

    /// <exception cref="LinuxException">The host cannot run guest instructions as its own.</exception>
    internal VectorUnit(VcpuBlock* block)
    {
        if (!HostFeatures.Xsave)
            throw new LinuxException("the software CPU needs a host processor with XSAVE (2008 or later), and a hypervisor around it that shows it");
        try
        {
            ThunkCache.Prepare();
        }
        catch (TypeInitializationException e) when (e.InnerException is LinuxException)
        {
            throw new LinuxException("the software CPU needs memory for generated code, which a security policy may forbid: " + e.InnerException.Message, e);
        }
        _s = block;
    }

    /// <summary>
    /// The FERR# pin: asserted when an x87 instruction meets a pending unmasked exception while CR0.NE is clear; a PC wires it to IRQ 13. Where nothing is
    /// connected the exception is delivered as #MF, as with CR0.NE set.
    /// </summary>
    public Action<bool>? NumericError { get; set; }

    /// <summary>The IGNNE# pin: x87 instructions run on over a pending exception. A PC asserts it on a write to port F0h until FERR# falls.</summary>
    public bool IgnoreNumericError { get; set; }

    /// <summary>A waiting instruction met a pending exception. True: it runs all the same. False: #MF was recorded, or the instruction waits for an interrupt.</summary>
    internal bool ReportPending()
    {
        if ((_s->Cr0 & (ulong)Cr0.NE) != 0 || NumericError is null)
            return Access.Record(_s, ExceptionVector.FloatingPoint);
        if (!_ferr)
        {
            _ferr = true;
            NumericError(true);
        }
        return IgnoreNumericError;
    }

    /// <summary>The pending exception was cleared: FERR# falls, and with it what holds IGNNE#.</summary>
    internal void ErrorCleared()
    {
        if (!_ferr)
            return;
        _ferr = false;
        IgnoreNumericError = false;
        NumericError?.Invoke(false);
    }

    internal void Get(ref CpuState state)
    {
        fixed (XsaveImage* image = &state.Xsave)
        {
            byte* area = (byte*)image;
            new Span<byte>(area, sizeof(XsaveImage)).Clear();
            XsaveArea.WriteX87(_s, area, allPointers: true);
            *(ulong*)(area + XsaveArea.FpuIp) = JoinPointer(_s->FpuIp, _s->FpuCs);
            *(ulong*)(area + XsaveArea.FpuDp) = JoinPointer(_s->FpuDp, _s->FpuDs);
            XsaveArea.WriteMxcsr(_s, area);
            XsaveArea.WriteXmm(_s, area, 16);
            XsaveArea.WriteYmm(_s, area, 16);
            *(ulong*)(area + XsaveArea.StateBv) = HostFeatures.Xcr0Mask;
        }
    }

    internal void Set(in CpuState state)
    {
        fixed (XsaveImage* image = &state.Xsave)
        {
            byte* area = (byte*)image;
            ulong components = *(ulong*)(area + XsaveArea.StateBv);
            if ((components & XsaveArea.ComponentX87) != 0)
            {
                XsaveArea.ReadX87(_s, area);
                ulong ip = *(ulong*)(area + XsaveArea.FpuIp);
                ulong dp = *(ulong*)(area + XsaveArea.FpuDp);
                _s->FpuOpcode = (ushort)(*(ushort*)(area + XsaveArea.FpuOpcode) & 0x7ff);
                bool longMode = (state.Efer & (ulong)Efer.LMA) != 0;
                _s->FpuIp = longMode ? ip : (uint)ip;
                _s->FpuDp = longMode ? dp : (uint)dp;
                _s->FpuCs = longMode ? (ushort)0 : (ushort)(ip >> 32);
                _s->FpuDs = longMode ? (ushort)0 : (ushort)(dp >> 32);
                X87State.MirrorPointers(_s);
            }
            else
            {
                X87State.InitializeAll(_s);
            }
            bool sse = (components & XsaveArea.ComponentSse) != 0;
            bool avx = (components & XsaveArea.ComponentAvx) != 0;
            _s->Mxcsr = sse || avx ? *(uint*)(area + XsaveArea.Mxcsr) & XsaveArea.MxcsrMask : FloatingPoint.DefaultMxcsr;
            XsaveArea.ReadXmm(_s, sse ? area : null, 16);
            XsaveArea.ReadYmm(_s, avx ? area : null, 16);
        }
        _ferr = false;
        IgnoreNumericError = false;
    }

    /// <summary>Outside long mode a pointer is an offset of 32 bits and a selector, and the image has room for both.</summary>
    private ulong JoinPointer(ulong offset, ushort selector) =>
        (_s->Efer & (ulong)Efer.LMA) != 0 ? offset : (uint)offset | (ulong)selector << 32;
}
