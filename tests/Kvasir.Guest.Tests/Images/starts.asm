; A 32-bit ELF file with a PVH note. Starts its second processor COUNT times by INIT and SIPI, while that one is halted or at work. Each time it goes from real to long mode, adds up
; and counts itself. A dot for each sixteenth; leaves with 24h.
%ifndef COUNT
%define COUNT 64
%endif
bits 32
org 0x200000

%define APIC 0xfee00000
%define CODE 0x8000                 ; where the second processor begins
%define TABLES 0x10000              ; its page tables: PML4, PDPT, PD

%include "pvh.inc"

start:
  mov esp, stack
  cld
  mov esi, trampoline
  mov edi, CODE
  mov ecx, trampoline_end - trampoline
  rep movsb
  or dword [APIC + 0xf0], 0x100     ; the local APIC by software
  xor ebp, ebp
again:
  call tables
  mov eax, ebp
  and eax, 3
  mov [work], eax
  mov dword [APIC + 0x310], 1 << 24
  mov dword [APIC + 0x300], 0xc500  ; INIT
  call sent
  mov eax, ebp
  and eax, 0x3f
  call delay
  mov dword [APIC + 0x310], 1 << 24
  mov dword [APIC + 0x300], 0x8500  ; the end of INIT's level, which processors since the Pentium 4 do not hear
  call sent
  mov dword [APIC + 0x310], 1 << 24
  mov dword [APIC + 0x300], 0x600 | CODE >> 12
  call sent
  mov eax, ebp
  shr eax, 2
  and eax, 0xff
  call delay
  mov dword [APIC + 0x310], 1 << 24
  mov dword [APIC + 0x300], 0x600 | CODE >> 12
  call sent
  lea edx, [ebp + 1]
wait_for_it:
  pause
  cmp [counted], edx
  jne wait_for_it
  inc ebp
  test ebp, COUNT / 16 - 1
  jnz no_dot
  mov al, '.'
  out 0xe9, al
no_dot:
  cmp ebp, COUNT
  jne again
  mov al, 10
  out 0xe9, al
  mov al, 0x24
  mov dx, 0x501
  out dx, al
  cli
stop:
  hlt
  jmp stop

sent:
  test dword [APIC + 0x300], 1 << 12
  jnz sent
  ret

; EAX times a little.
delay:
  test eax, eax
  jz delay_over
delay_more:
  pause
  dec eax
  jnz delay_more
delay_over:
  ret

; The second processor's page tables, made anew in another place each time: what it has cached of those before does not hold.
tables:
  mov eax, ebp
  and eax, 7
  imul eax, 0x3000
  add eax, TABLES
  mov [CODE + root - trampoline], eax
  mov edi, eax
  mov ebx, eax
  xor eax, eax
  mov ecx, 0x3000 / 4
  rep stosd
  lea eax, [ebx + 0x1003]
  mov [ebx], eax
  lea eax, [ebx + 0x2003]
  mov [ebx + 0x1000], eax
  mov dword [ebx + 0x2000], 0x83
  mov dword [ebx + 0x2008], 0x200083
  ret

bits 16
trampoline:
  cli
  mov ax, cs
  mov ds, ax
  o32 lgdt [gdt_at - trampoline]
  mov eax, cr0
  or al, 1
  mov cr0, eax
  jmp dword 8:CODE + protected - trampoline

bits 32
protected:
  mov ax, 16
  mov ds, ax
  mov ss, ax
  mov eax, 0x20
  mov cr4, eax
  mov eax, [CODE + root - trampoline]
  mov cr3, eax
  mov ecx, 0xc0000080
  rdmsr
  or eax, 0x100
  wrmsr
  mov eax, 0x80000001
  mov cr0, eax
  jmp 24:CODE + long_mode - trampoline

bits 64
long_mode:
  mov esp, stack2
  mov rcx, 1000
  xor eax, eax
sum:
  push rcx
  add rax, [rsp]
  pop rcx
  loop sum
  cmp rax, 500500
  jne bad
  inc dword [abs counted]
  cmp dword [abs work], 0
  je halt
  cmp dword [abs work], 1
  je busy
  cmp dword [abs work], 2
  je leaves
halt:
  hlt
  jmp halt
busy:
  inc qword [abs work + 8]
  jmp busy
leaves:
  mov dx, 0x80
  in al, dx
  cpuid
  jmp leaves
bad:
  ud2

align 8
gdt:
  dq 0
  dq 0x00cf9b000000ffff
  dq 0x00cf93000000ffff
  dq 0x00af9b000000ffff
gdt_at:
  dw 31
  dd CODE + gdt - trampoline
root:
  dd 0
trampoline_end:

align 16
counted:
  dd 0, 0
work:
  dq 0, 0
  times 256 db 0
stack:
  times 256 db 0
stack2:
end:
