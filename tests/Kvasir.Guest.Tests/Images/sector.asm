; A boot sector that prints LETTER to the debug console and leaves with code 1. With FAIL it returns to the firmware, which tries the next disk.
bits 16
org 0x7c00
start:
  mov al, LETTER
  out 0xe9, al
%ifdef FAIL
  int 0x18
%endif
  xor al, al
  mov dx, 0x501
  out dx, al
.stop:
  hlt
  jmp .stop
times 510 - ($ - $$) db 0
  dw 0xaa55
