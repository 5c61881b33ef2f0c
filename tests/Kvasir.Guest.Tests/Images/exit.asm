; A ROM of 64 KiB that leaves at once, with CODE.
bits 16
org 0
start:
  mov al, CODE
  mov dx, 0xf4
  out dx, al
.stop:
  hlt
  jmp .stop
times 0xfff0 - ($ - $$) db 0xff
  jmp 0xf000:start
times 0x10000 - ($ - $$) db 0xff
