; A 32-bit ELF file with a PVH note (Xen, x86/HVM direct boot ABI): checks the start info, prints to the debug console and leaves with 22h.
bits 32
org 0x200000

file:
  db 0x7f, 'ELF', 1, 1, 1
  times 9 db 0
  dw 2, 3
  dd 1, start, headers - file, 0, 0
  dw 52, 32, 2, 0, 0, 0
headers:
  dd 1, 0, file, file, end - file, end - file, 7, 0x1000
  dd 4, note - file, note, note, 20, 20, 4, 4
note:
  dd 4, 4, 18
  db 'Xen', 0
  dd start

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
