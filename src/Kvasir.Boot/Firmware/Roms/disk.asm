; The option ROM that has a BIOS boot from another disk than its first one (nasm -f bin). SeaBIOS tries one hard disk and no second; this ROM stands in its boot order
; for one more. It reads the disk's first sector and starts it, with the disk in the first one's place for as long as the BIOS is asked.
;
; PnP BIOS specification 1.0A, ch. 3 (header, expansion header, bootstrap entry vector); BIOS Boot Specification 1.01, 3.3; EDD-3 for INT 13h.
; DiskRom.cs fills in the disk's number and the checksums. Assemble it anew after a change: nasm -f bin -o disk.bin disk.asm

        bits    16
        org     0

FIRST   equ     0x80

        dw      0xaa55
        db      1                       ; 512 bytes
        jmp     near initialise
        times   0x1a - ($ - $$) db 0
        dw      expansion

expansion:
        db      '$PnP', 1, 2            ; version 1.0, 2 x 16 bytes
        dw      0                       ; no further header
        db      0, 0                    ; checksum: filled in
        dd      0
        dw      0                       ; no manufacturer's name
        dw      name
        db      0, 0, 0                 ; device type
        db      0x04                    ; an initial program load device
        dw      0, 0                    ; no boot connection vector, no disconnect vector
        dw      boot
        dw      0
        dw      0

name:   db      'Disk '
number: db      '0', 0

; What the disk is called by the BIOS, and who answered INT 13h before.
mark:   db      'disk'
drive:  db      0
old:    dd      0

; Once, while the ROM may still be written.
initialise:
        push    ds
        push    ebx
        push    cx
        xor     bx, bx
        mov     ds, bx
        mov     ebx, [0x13 * 4]
        mov     [cs:old], ebx
        xor     bx, bx
        ; The BIOS adds up all bytes once more.
        mov     cx, 512
        xor     ax, ax
.add:   add     al, [cs:bx]
        inc     bx
        loop    .add
        sub     [cs:511], al
        pop     cx
        pop     ebx
        pop     ds
        mov     ax, 0x0020              ; an IPL device is attached
        retf

; The bootstrap entry: comes back where the disk does not boot, and the BIOS goes on to what is next.
boot:   sti
        cld
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     si, 3
.read:  mov     ax, 0x0201
        mov     bx, 0x7c00
        mov     cx, 1
        mov     dh, 0
        mov     dl, [cs:drive]
        int     0x13
        jnc     .got
        dec     si
        jnz     .read
        retf
.got:   cmp     word [0x7dfe], 0xaa55
        je      .start
        retf
.start: mov     dl, [cs:drive]
        mov     eax, [0x13 * 4]
        cmp     eax, [cs:old]
        je      .hook
        ; Another of these ROMs was tried before, or somebody else's handler is there: that one stays, and the disk keeps its own number.
        mov     es, [0x13 * 4 + 2]
        cmp     dword [es:mark], 'disk'
        jne     .go
.hook:  mov     word [0x13 * 4], int13
        mov     [0x13 * 4 + 2], cs
        mov     dl, FIRST
.go:    mov     dh, 0
        xor     bx, bx
        mov     es, bx
        jmp     0:0x7c00

; INT 13h with the two disks' numbers exchanged.
int13:  push    ax                      ; the function
        call    exchange
        pushf
        call    far [cs:old]
        push    bp
        mov     bp, sp                  ; [bp + 2] AX, [bp + 4] IP, [bp + 6] CS, [bp + 8] flags: the caller's
        jc      .bad
        and     byte [bp + 8], 0xfe
        jmp     short .told
.bad:   or      byte [bp + 8], 1
.told:  cmp     byte [bp + 3], 0x08     ; DL is the number of disks
        je      .end
        cmp     byte [bp + 3], 0x15     ; DX is part of a size
        je      .end
        call    exchange
.end:   pop     bp
        add     sp, 2
        iret

exchange:
        cmp     dl, FIRST
        je      .first
        cmp     dl, [cs:drive]
        jne     .neither
        mov     dl, FIRST
.neither:
        ret
.first: mov     dl, [cs:drive]
        ret

        times   512 - ($ - $$) db 0
