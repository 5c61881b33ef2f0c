using System;
using System.IO;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Cli.Terminal;
using Kvasir.Devices.Serial;
using Xunit;

namespace Kvasir.Cli.Tests;

public sealed class UnixSocketBackendTests : IDisposable
{
    private sealed class Device : ICharacterDevice
    {
        private readonly object _lock = new();
        private readonly StringBuilder _received = new();
        private bool _connected = true;

        public int Room { get; set; } = int.MaxValue;

        public string Received
        {
            get
            {
                lock (_lock)
                    return _received.ToString();
            }
        }

        public int Receive(ReadOnlySpan<byte> bytes)
        {
            lock (_lock)
            {
                int taken = Math.Min(bytes.Length, Room);
                Room -= taken;
                _received.Append(Encoding.Latin1.GetString(bytes[..taken]));
                Monitor.PulseAll(_lock);
                return taken;
            }
        }

        public void OutputPossible()
        {
        }

        public void ReceiveBreak()
        {
        }

        public void SetConnected(bool connected)
        {
            lock (_lock)
            {
                _connected = connected;
                Monitor.PulseAll(_lock);
            }
        }

        public bool WaitFor(Func<Device, bool, bool> condition)
        {
            long deadline = Environment.TickCount64 + 10_000;
            lock (_lock)
            {
                while (!condition(this, _connected))
                {
                    int left = (int)(deadline - Environment.TickCount64);
                    if (left <= 0 || !Monitor.Wait(_lock, left))
                        return condition(this, _connected);
                }
                return true;
            }
        }
    }

    private readonly string _path = Path.Combine(Path.GetTempPath(), $"kvasir-test-{Guid.NewGuid():N}.sock");

    public void Dispose() => File.Delete(_path);

    [Fact]
    public async Task ClientsComeAndGo()
    {
        Device device = new();
        using (UnixSocketBackend backend = new(_path))
        {
            backend.Attach(device);
            backend.Start();
            Assert.True(device.WaitFor((_, connected) => !connected));
            Assert.Equal(5, backend.Write("nobod"u8));
            for (int round = 0; round < 3; round++)
            {
                using Socket client = Connect();
                Assert.True(device.WaitFor((_, connected) => connected));
                Assert.Equal(5, backend.Write("hello"u8));
                Assert.Equal("hello", await ReadAsync(client, 5));
                client.Send("abc"u8);
                string expected = string.Concat(System.Linq.Enumerable.Repeat("abc", round + 1));
                Assert.True(device.WaitFor((d, _) => d.Received == expected));
                client.Close();
                Assert.True(device.WaitFor((_, connected) => !connected));
            }
        }
        Assert.False(File.Exists(_path));
    }

    [Fact]
    public void InputWaitsForTheGuestsRoom()
    {
        Device device = new() { Room = 3 };
        using UnixSocketBackend backend = new(_path);
        backend.Attach(device);
        backend.Start();
        using Socket client = Connect();
        client.Send("0123456789"u8);
        Assert.True(device.WaitFor((d, _) => d.Received == "012"));
        device.Room = 100;
        backend.ResumeInput();
        Assert.True(device.WaitFor((d, _) => d.Received == "0123456789"));
    }

    [Fact]
    public void ASocketInUseIsRefusedAndAStaleOneReplaced()
    {
        using (UnixSocketBackend first = new(_path))
        {
            first.Attach(new Device());
            first.Start();
            CommandException fault = Assert.Throws<CommandException>(() => new UnixSocketBackend(_path));
            Assert.Contains("another process listens there", fault.Message, StringComparison.Ordinal);
        }
        string elsewhere = _path + "-bound";
        using (Socket dead = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            dead.Bind(new UnixDomainSocketEndPoint(elsewhere));
            // .NET removes the file that it bound, by its name.
            File.Move(elsewhere, _path);
        }
        Assert.True(File.Exists(_path));
        using UnixSocketBackend second = new(_path);
    }

    [Fact]
    public void AFileThatIsNoSocketIsLeftAlone()
    {
        File.WriteAllText(_path, "precious");
        Assert.Throws<CommandException>(() => new UnixSocketBackend(_path));
        Assert.Equal("precious", File.ReadAllText(_path));
    }

    private Socket Connect()
    {
        Socket client = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        client.Connect(new UnixDomainSocketEndPoint(_path));
        return client;
    }

    private static async Task<string> ReadAsync(Socket client, int length)
    {
        byte[] buffer = new byte[length];
        int at = 0;
        while (at < length)
        {
            int read = await client.ReceiveAsync(buffer.AsMemory(at), TestContext.Current.CancellationToken);
            if (read == 0)
                break;
            at += read;
        }
        return Encoding.Latin1.GetString(buffer, 0, at);
    }
}
