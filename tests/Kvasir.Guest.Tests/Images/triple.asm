; A ROM of 64 KiB whose protected-mode code has no interrupt table and divides by zero: the processor shuts down.
bits 16
org 0
start:
  cli
  o32 lgdt [cs:gdtr]
  o32 lidt [cs:nothing]
  mov eax, cr0
  or al, 1
  mov cr0, eax
  jmp dword 8:protected
bits 32
protected:
  mov eax, 0xdeadbeef
  xor ecx, ecx
  div ecx
align 8
gdt:
  dq 0, 0x00409b0f0000ffff
gdtr:
  dw 15
  dd gdt + 0xf0000
nothing:
  dw 0
  dd 0
times 0xfff0 - ($ - $$) db 0xff
bits 16
  jmp 0xf000:start
times 0x10000 - ($ - $$) db 0xff
