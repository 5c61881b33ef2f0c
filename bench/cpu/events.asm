; A multiboot kernel that times single events of a processor: after each line on the serial port the next part begins.
; bench.sh events takes the time between the lines.
bits 32
org 0x100000

magic equ 0x1badb002
flags equ 0x10002
tables equ 0x200000
leaves equ 0x210000                 ; 32 page tables of a region of 64 MiB
region equ 0x40000000
frames equ 0x1000000
missing equ 0x80000000
idt equ 0x300000
scratch_port equ 0x3ff              ; the scratch register of the first serial port

; MISSES accesses each, to 256 pages and to 15000.
ACCESSES equ 30000000
FAULTS equ 2000000
PORTS equ 5000000

header:
  dd magic, flags, -(magic + flags)
  dd header, header, end, end, start

start:
  cli
  mov edi, tables
  xor eax, eax
  mov ecx, 0x110000 / 4
  rep stosd
  mov dword [tables], tables + 0x1003
  mov dword [tables + 0x1000], tables + 0x2003
  mov dword [tables + 0x1008], tables + 0x3003
  ; The first GiB by 2 MiB pages, accessed and dirty.
  mov edi, tables + 0x2000
  mov eax, 0xe3
large:
  mov [edi], eax
  add eax, 0x200000
  add edi, 8
  cmp edi, tables + 0x3000
  jne large
  mov edi, tables + 0x3000
  mov eax, leaves + 3
directory:
  mov [edi], eax
  add eax, 0x1000
  add edi, 8
  cmp edi, tables + 0x3000 + 32 * 8
  jne directory
  mov edi, leaves
  mov eax, frames + 0x63
small:
  mov [edi], eax
  add eax, 0x1000
  add edi, 8
  cmp edi, leaves + 32 * 4096
  jne small
  mov eax, tables
  mov cr3, eax
  mov eax, cr4
  or eax, 0x20
  mov cr4, eax
  mov ecx, 0xc0000080
  rdmsr
  or eax, 0x100
  wrmsr
  mov eax, cr0
  or eax, 0x80010001
  mov cr0, eax
  lgdt [gdt_pointer]
  jmp 8:long_mode

bits 64
long_mode:
  mov ax, 16
  mov ds, ax
  mov es, ax
  mov ss, ax
  mov rsp, 0x180000
  lea rax, [rel handler]
  mov rdi, idt + 14 * 16
  mov [rdi], ax
  mov word [rdi + 2], 8
  mov word [rdi + 4], 0x8e00
  shr rax, 16
  mov [rdi + 6], ax
  shr rax, 16
  mov [rdi + 8], eax
  lidt [rel idt_pointer]

  mov ebp, 256
  call touch
  mov ebp, 256
  mov al, 'h'
  call say
  call touch
  mov al, 'm'
  call say
  mov ebp, 15000
  call touch
  mov al, 'f'
  call say
  mov ecx, FAULTS
  mov r10d, missing
  lea r11, [rel after]
fault:
  mov al, [r10]
after:
  dec ecx
  jnz fault
  mov al, 'p'
  call say
  mov ecx, PORTS
  mov dx, scratch_port
port:
  out dx, al
  dec ecx
  jnz port
  mov al, 'e'
  call say
  mov al, 0x10
  mov dx, 0xf4
  out dx, al
stop:
  hlt
  jmp stop

; ACCESSES reads, round and round through EBP pages, each page at another line.
touch:
  mov ecx, ACCESSES
round:
  mov rbx, region
  mov edx, ebp
next:
  add rax, [rbx]
  add rbx, 4096 + 64
  dec ecx
  jz done
  dec edx
  jnz next
  jmp round
done:
  ret

say:
  mov dx, 0x3f8
  out dx, al
  mov al, 10
  out dx, al
  ret

; Goes on at R11.
handler:
  mov [rsp + 8], r11
  add rsp, 8
  iretq

align 8
gdt:
  dq 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
  dw 23
  dd gdt
  dd 0
idt_pointer:
  dw 0xfff
  dq idt
end:
