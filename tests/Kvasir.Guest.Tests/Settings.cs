using Xunit.v3;

// Each test has a VM of its own, and two of them keep a small machine busy.
[assembly: Parallelization(MaxThreads = 2)]
