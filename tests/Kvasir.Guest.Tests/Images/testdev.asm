; A multiboot kernel for pc-testdev: its register and its memory, and an interrupt that its line raises through the I/O APIC. Prints one letter a step
; to the debug console and leaves with 23h; what went wrong leaves with 1.
bits 32
org 0x100000

magic equ 0x1badb002
flags equ 0x10002
local equ 0xfee00000
ioapic equ 0xfec00000
pin equ 10
vector equ 0x45

header:
  dd magic, flags, -(magic + flags)
  dd header, header, end, end, start

; The console's usual port E9h is the test device's.
%macro put 1
  mov al, %1
  mov dx, 0x402
  out dx, al
%endmacro

start:
  mov esp, stack
  lgdt [gdtr]
  jmp 8:.flat
.flat:
  mov ax, 16
  mov ds, ax
  mov es, ax
  mov ss, ax

  ; The register, by its dword and its bytes.
  mov eax, 0x12345678
  mov dx, 0xe0
  out dx, eax
  xor eax, eax
  in eax, dx
  cmp eax, 0x12345678
  jne wrong
  mov dx, 0xe8
  mov al, 0x5a
  out dx, al
  mov dx, 0xe0
  in eax, dx
  cmp al, 0x5a
  jne wrong
  put 'r'

  ; The memory.
  mov edi, 0xff000000
  mov dword [edi + 0x123], 0xcafef00d
  cmp dword [edi + 0x123], 0xcafef00d
  jne wrong
  cmp word [edi + 0x124], 0xfef0
  jne wrong
  put 'm'

  ; An interrupt.
  mov eax, handler
  mov [idt + vector * 8], ax
  mov word [idt + vector * 8 + 2], 8
  mov word [idt + vector * 8 + 4], 0x8e00
  shr eax, 16
  mov [idt + vector * 8 + 6], ax
  lidt [idtr]
  mov dword [local + 0xf0], 0x1ff
  mov dword [local + 0x80], 0
  mov dword [ioapic], 0x10 + pin * 2 + 1
  mov dword [ioapic + 0x10], 0
  mov dword [ioapic], 0x10 + pin * 2
  mov dword [ioapic + 0x10], vector
  sti
  mov dx, 0x2000 + pin
  mov al, 1
  out dx, al
wait_for_it:
  cmp byte [came], 1
  jne wait_for_it
  xor al, al
  out dx, al
  put 'i'
  ; Once more, out of HLT: the interrupt is there when the processor stops, or wakes it.
  mov byte [came], 0
  cli
  mov dx, 0x2000 + pin
  mov al, 1
  out dx, al
  sti
  hlt
  cmp byte [came], 1
  jne wrong
  put 'h'
  put 10
  mov al, 0x23
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

handler:
  mov byte [came], 1
  mov dword [local + 0xb0], 0
  iret

align 8
gdt:
  dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr:
  dw 23
  dd gdt
idtr:
  dw 0x7ff
  dd idt
came:
  db 0
align 16
idt:
  times 0x800 db 0
  times 1024 db 0
stack:
end:
