#!/bin/sh
# Runs with the host's own programs, in the guest and on the host: both must print the same. Libraries choose AVX2, FMA, AES and SHA code by CPUID.
# Expects key.pem, an RSA key, in the current folder.
LC_ALL=C
export LC_ALL
PATH=/usr/bin:/bin

perl -e 'for my $i (1 .. 400) { my $x = $i * 0.37; printf "%.17g %.17g %.17g %.17g %.17g %.17g\n", sin($x), cos($x), exp($x / 40), log($x), sqrt($x), $x ** 1.7 }' >float
perl -e 'my $s = 0; $s += 1 / $_ for 1 .. 20000; printf "sum %.17g\n", $s; printf "%.17g %.17g %.17g\n", atan2(1, 3), 1e308 * 10, -1 / 3'
sha256sum float
perl -e 'my ($x, %h) = (1); for (1 .. 20000) { $x = ($x * 1103515245 + 12345) % 2147483648; $h{$x % 5003} .= chr(97 + $x % 26) }
  print join(",", map { "$_=$h{$_}" } (sort { $a <=> $b } keys %h)[0 .. 9]), "\n"; my $all = join("", map { $h{$_} } sort keys %h);
  my $n = () = $all =~ /([aeiou])(?!\1)/g; print length($all), " ", $n, " ", ($all =~ tr/a-m//), " ", unpack("%32C*", $all), "\n"'
perl -e 'my ($x, $y) = (3037000500, 4294967291); print $x * 2, " ", int($x / 7), " ", -$y % 1000, " ", ($x << 7) ^ ($y >> 3), " ", $x * $y, "\n"'
perl -e 'my $d = ""; my $x = 42; for (1 .. 30000) { $x = ($x * 69069 + 1) & 0xffffffff; $d .= pack("N", $x) } print $d' >data
cksum data
sort -R --random-source=data data 2>/dev/null | wc -c
md5sum data
sha1sum data
sha512sum data
gzip -9 -n -c data float | sha256sum
gzip -c float | gzip -dc | cmp - float && echo same
for digest in sha256 sha512 sha3-256 blake2b512 sm3; do
  openssl dgst -$digest data
done
for cipher in aes-128-cbc aes-256-ctr aes-256-ecb chacha20 camellia-128-cbc; do
  openssl enc -$cipher -K 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff -iv 0102030405060708090a0b0c0d0e0f10 -in data 2>/dev/null | sha256sum
done
openssl dgst -sha256 -sign key.pem data | sha256sum
openssl dgst -sha256 -sign key.pem data >signature
openssl rsa -in key.pem -pubout -out public.pem 2>/dev/null
openssl dgst -sha256 -verify public.pem -signature signature data
