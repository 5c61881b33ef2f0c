; A multiboot kernel (Multiboot Specification 0.6.96) by address fields: prints its command line to the debug console and leaves with 21h.
bits 32
org 0x100000

magic equ 0x1badb002
flags equ 0x10002

header:
  dd magic, flags, -(magic + flags)
  dd header, header, end, end, start

start:
  cmp eax, 0x2badb002
  jne wrong
  test dword [ebx], 4               ; there is a command line
  jz wrong
  mov esi, [ebx + 16]
  mov dx, 0xe9
next:
  lodsb
  test al, al
  jz done
  out dx, al
  jmp next
done:
  mov al, 10
  out dx, al
  mov al, 0x21
  jmp leave_machine
wrong:
  mov al, 1
leave_machine:
  mov dx, 0x501
  out dx, al
  cli
stop:
  hlt
  jmp stop
end:
