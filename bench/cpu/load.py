"""Recursion, dictionaries, strings and integers, as scripts use them."""


def ackermann(m, n):
    if m == 0:
        return n + 1
    return ackermann(m - 1, 1 if n == 0 else ackermann(m, n - 1))


def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)


def words(count):
    seed = 12345
    for _ in range(count):
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        yield "w%x" % (seed % 5003)


counts = {}
for word in words(60000):
    counts[word] = counts.get(word, 0) + len(word)
top = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
print(fib(22), ackermann(2, 60), top, sum(hash(i * 0.5) % 97 for i in range(60000)))
