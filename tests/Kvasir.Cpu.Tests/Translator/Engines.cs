using System;
using Kvasir.Cpu.Tests.Interpreter;
using Xunit;

namespace Kvasir.Cpu.Tests.Translation;

/// <summary>Runs a program on the interpreter and with the translator, which must leave the same answers.</summary>
internal static class Engines
{
    /// <summary>Where programs leave their answers, and how many quadwords of them are compared.</summary>
    public const ulong Answer = LongModeMachine.Data;
    private const int Answers = 64;

    /// <param name="build">Assembles the program; it begins at <see cref="LongModeMachine.Program"/>.</param>
    /// <param name="check">Looks at the translator afterwards.</param>
    public static void AgreeOn(Action<LongModeMachine> build, Action<Translator>? check = null)
    {
        ulong[][] answers = new ulong[2][];
        for (int engine = 0; engine < answers.Length; engine++)
        {
            using LongModeMachine machine = new(translate: engine == 1);
            build(machine);
            machine.Run(LongModeMachine.Program);
            answers[engine] = new ulong[Answers];
            for (int i = 0; i < Answers; i++)
                answers[engine][i] = machine.Read(Answer + (ulong)i * 8);
            if (engine == 0)
                continue;
            Translator translator = machine.Code.Translator!;
            Assert.True(translator.BlocksTranslated > 0);
            check?.Invoke(translator);
        }
        Assert.NotEqual(0ul, answers[0][0]);
        Assert.Equal(answers[0], answers[1]);
    }
}
