; A 32-bit ELF file with a PVH note (Xen, x86/HVM direct boot ABI): checks the start info, prints to the debug console and leaves with 22h.
bits 32
org 0x200000

%include "pvh.inc"

start:
  cmp dword [ebx], 0x336ec578
  jne wrong
  mov eax, [ebx + 32]               ; the RSDP
  cmp dword [eax], 'RSD '
  jne wrong
  cmp dword [ebx + 48], 0           ; entries of the memory map
  je wrong
  mov esi, [ebx + 24]               ; the command line
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
  mov al, 0x22
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
