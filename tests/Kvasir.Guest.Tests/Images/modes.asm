; A ROM of 64 KiB that walks through the processor's modes: real with INT and IRET; protected with gates, exceptions and 4 MiB pages; a virtual-8086 task;
; long; and back to real. Prints a letter a step to the debug console and leaves with 2Ah, or with the failed step's letter.
bits 16
org 0

rom equ 0xf0000
idt equ 0x8000
tss equ 0x9000
directory equ 0x100000
long_tables equ 0x110000
alias equ 0x40000000
nowhere equ 0x80000000

code32 equ 0x08
data32 equ 0x10
code16 equ 0x18
data16 equ 0x20
task equ 0x28
code64 equ 0x30

%macro step 1
  mov al, %1
  out 0xe9, al
  mov byte [0x500], al
%endmacro

start:
  cli
  cld
  xor ax, ax
  mov ds, ax
  mov es, ax
  mov ss, ax
  mov sp, 0x7000

  step 'R'
  mov word [0x60 * 4], real_interrupt
  mov word [0x60 * 4 + 2], 0xf000
  mov cx, 0x1234
  stc
  int 0x60
  jnc near wrong16
  cmp bx, 0x2341
  jne near wrong16
  ; A division by zero faults: the saved address is the instruction's own.
  mov word [0], real_divide
  mov word [2], 0xf000
  xor bx, bx
  div bl
after_divide:
  cmp bx, 0x77
  jne near wrong16

  step 'P'
  o32 lgdt [cs:gdtr]
  mov eax, cr0
  or al, 1
  mov cr0, eax
  jmp dword code32:protected

real_interrupt:
  mov bx, cx
  rol bx, 4
  clc
  iret

real_divide:
  push bp
  mov bp, sp
  add word [bp + 2], 2
  mov bx, 0x77
  pop bp
  iret

wrong16:
  mov al, [0x500]
  mov dx, 0x501
  out dx, al
.stop:
  hlt
  jmp .stop

bits 32
; gate VECTOR, HANDLER, TYPE
%macro gate 3
  mov word [idt + %1 * 8], %2
  mov word [idt + %1 * 8 + 2], code32
  mov word [idt + %1 * 8 + 4], %3
  mov word [idt + %1 * 8 + 6], 0
%endmacro

protected:
  mov ax, data32
  mov ds, ax
  mov es, ax
  mov ss, ax
  mov esp, 0x7000
  mov edi, idt
  mov ecx, 512
  xor eax, eax
  rep stosd
  gate 0, skip_two, 0x8e00
  gate 6, skip_two, 0x8e00
  gate 13, general_protection, 0x8e00
  gate 14, page_fault, 0x8e00
  gate 0x30, interrupt, 0x8f00
  lidt [rom + idtr]

  step 'i'
  mov ecx, 0x11112222
  int 0x30
  cmp ebx, 0x22221111
  jne near wrong

  step 'd'
  xor ebx, ebx
  mov esi, 5
  div ebx
  cmp esi, 6
  jne near wrong

  step 'u'
  ud2
  cmp esi, 7
  jne near wrong

  step 'g'
  mov ax, 0x58
  mov fs, ax
  cmp ebx, 0x58
  jne near wrong

  ; Pages of 4 MiB: memory in place, and its first 4 MiB once more at the alias.
  step 'p'
  mov edi, directory
  mov ecx, 1024
  xor eax, eax
  rep stosd
  mov dword [directory], 0x87                          ; the task is a user
  mov dword [directory + (alias >> 22) * 4], 0x83
  mov eax, cr4
  or al, 0x10
  mov cr4, eax
  mov eax, directory
  mov cr3, eax
  mov eax, cr0
  or eax, 0x80000000
  mov cr0, eax
  mov dword [alias + 0x6000], 0x600df00d
  cmp dword [0x6000], 0x600df00d
  jne near wrong
  test byte [directory + (alias >> 22) * 4], 0x40      ; dirty
  jz near wrong
  xor ebx, ebx
  mov ecx, [nowhere + 0x123]
  cmp ebx, nowhere + 0x123
  jne near wrong

  ; A virtual-8086 task: its INT and its HLT come to the monitor.
  step 'v'
  mov edi, tss
  mov ecx, 26
  xor eax, eax
  rep stosd
  mov dword [tss + 4], 0x6800
  mov dword [tss + 8], data32
  mov word [tss + 102], 104
  mov ax, task
  ltr ax
  mov dword [0x504], esp
  push dword 0                      ; GS, FS, DS, ES
  push dword 0
  push dword 0
  push dword 0
  push dword 0                      ; SS:ESP
  push dword 0x5f00
  push dword 0x20002                ; EFLAGS: VM
  push dword 0xf000
  push dword virtual
  iretd
back_from_virtual:
  cmp word [0x10004], 0xbeef
  jne near wrong
  cmp byte [0x508], 0x21
  jne near wrong

  ; Long mode, with 2 MiB pages.
  step 'L'
  mov eax, cr0
  and eax, 0x7fffffff
  mov cr0, eax
  mov edi, long_tables
  mov ecx, 3 * 1024
  xor eax, eax
  rep stosd
  mov dword [long_tables], long_tables + 0x1003
  mov dword [long_tables + 0x1000], long_tables + 0x2003
  mov dword [long_tables + 0x2000], 0x83
  mov eax, cr4
  or al, 0x20
  mov cr4, eax
  mov eax, long_tables
  mov cr3, eax
  mov ecx, 0xc0000080
  rdmsr
  or ah, 1
  wrmsr
  mov eax, cr0
  or eax, 0x80000000
  mov cr0, eax
  jmp code64:long_entry + rom

back_from_long:
  mov eax, cr0
  and eax, 0x7fffffff
  mov cr0, eax
  mov ecx, 0xc0000080
  rdmsr
  and ah, 0xfe
  wrmsr
  cmp dword [0x50c], 0x9abcdef0
  jne near wrong
  jmp code16:to_real

wrong:
  mov al, [0x500]
  mov dx, 0x501
  out dx, al
.stop:
  hlt
  jmp .stop

interrupt:
  mov ebx, ecx
  rol ebx, 16
  iretd

; For instructions of two bytes without an error code.
skip_two:
  add dword [esp], 2
  inc esi
  iretd

general_protection:
  test byte [esp + 14], 2           ; VM in the saved EFLAGS
  jnz monitor
  mov ebx, [esp]
  add esp, 4
  add dword [esp], 2
  iretd

; The faulting instruction has six bytes; its address goes to EBX.
page_fault:
  mov ebx, cr2
  add esp, 4
  add dword [esp], 6
  iretd

monitor:
  mov ax, data32
  mov ds, ax
  mov es, ax
  movzx edx, word [esp + 8]
  shl edx, 4
  add edx, [esp + 4]
  cmp byte [edx], 0xcd
  je .interrupt
  cmp byte [edx], 0xf4
  jne near wrong
  mov esp, [0x504]
  jmp back_from_virtual
.interrupt:
  mov al, [edx + 1]
  mov [0x508], al
  add dword [esp + 4], 2
  add esp, 4
  iretd

bits 16
virtual:
  mov ax, 0x1000
  mov ds, ax
  mov bx, 0xbeef
  int 0x21
  mov [4], bx
  hlt

to_real:
  mov ax, data16
  mov ds, ax
  mov es, ax
  mov ss, ax
  mov eax, cr0
  and al, 0xfe
  mov cr0, eax
  jmp 0xf000:real_again
real_again:
  xor ax, ax
  mov ds, ax
  mov ss, ax
  mov sp, 0x7000
  o32 lidt [cs:real_idtr]
  step 'r'
  mov cx, 0x4321
  int 0x60
  cmp bx, 0x3214
  jne near wrong16
  mov al, 10
  out 0xe9, al
  mov al, 0x2a
  mov dx, 0x501
  out dx, al
.stop:
  hlt
  jmp .stop

bits 64
long_entry:
  mov rax, 0x123456789abcdef0
  mov r15, rax
  ror r15, 32
  mov [abs 0x50c], eax
  cmp r15d, 0x12345678
  jne .wrong
  jmp far dword [rel .back]
.wrong:
  mov dword [abs 0x50c], 0
  jmp far dword [rel .back]
.back:
  dd back_from_long
  dw code32

align 8
gdt:
  dq 0
  dq 0x00409b0f0000ffff             ; code32, base F0000h
  dq 0x00cf93000000ffff             ; data32
  dq 0x00009b0f0000ffff             ; code16, base F0000h
  dq 0x000093000000ffff             ; data16
  dq 0x0000890090000067             ; the task
  dq 0x00209b0000000000             ; code64
gdtr:
  dw gdtr - gdt - 1
  dd gdt + rom
idtr:
  dw 0x7ff
  dd idt
real_idtr:
  dw 0x3ff
  dd 0

times 0xfff0 - ($ - $$) db 0xff
bits 16
  jmp 0xf000:start
times 0x10000 - ($ - $$) db 0xff
