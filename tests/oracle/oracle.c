// Runs instructions on the host's own processor for the tests of the software CPU.
//
// usage: oracle FILE
//
// FILE is memory shared with the test (layout below; SharedArea.cs has the same numbers). Each 4-byte count that arrives on standard input makes the helper
// run that many records in order; it answers with the count on standard output. A record holds a full user-level register state and the code to run; the
// helper fills in the state afterwards, or the exception that ended it. Everything here lies below 2 GiB (linked without PIE), so that code of every mode reaches it.

#define _GNU_SOURCE
#include <asm/ldt.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

struct state {
    u64 gpr[16];  // 0: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15
    u64 rip;      // 128: offset in the code segment
    u64 flags;    // 136
    u16 sel[6];   // 144: ES, CS, SS, DS, FS, GS
    u32 reserved; // 156
    u64 fsbase;   // 160: used where the selector is null
    u64 gsbase;   // 168
    u64 pad[2];   // 176
    u8 fx[512];   // 192: FXSAVE64 image; its XMM part is not used
    u8 ymm[512];  // 704
};

struct record {
    struct state in;  // 0
    struct state out; // 1216
    u32 vector;       // 2432: exception vector, VECTOR_NONE or VECTOR_TIMEOUT
    u32 error;        // 2436
    u64 cr2;          // 2440
    u64 hash;         // 2448: of the data pages, where they differ from the pristine ones
    u32 code_linear;  // 2456
    u32 code_length;  // 2460
    u32 patch_linear; // 2464: bytes put into the window before the code runs
    u32 patch_length; // 2468
    u32 mode;         // 2472: 16, 32 or 64
    u32 landing_length; // 2476: bytes of the jump back, which the helper puts behind the code
    u32 pad[4];       // 2480
    u8 code[512];     // 2496
    u8 patch[1024];   // 3008
    u8 tail[64];      // 4032
};
_Static_assert(sizeof(struct state) == 1216, "state");
_Static_assert(sizeof(struct record) == 4096, "record");

#define WINDOW 0x10000000u
#define WINDOW_PAGES 16
#define WINDOW_SIZE (WINDOW_PAGES * 4096u)
#define FILE_WINDOW 0x10000
#define FILE_PRISTINE 0x20000
#define FILE_RECORDS 0x30000
#define VECTOR_NONE 0x100
#define VECTOR_TIMEOUT 0x101

// What the code under test may do with each page of the window: the same table is in Window.cs.
#define N PROT_NONE
#define X (PROT_READ | PROT_EXEC)
#define R PROT_READ
#define W (PROT_READ | PROT_WRITE)
static const int page_rights[WINDOW_PAGES] = {X, X, N, W, W, N, R, W, N, W, W, N, N, N, N, N};
static const u16 user_code_64 = 0x33, user_data = 0x2b;

// What the assembly reads and writes.
struct state cur_in __attribute__((aligned(64)));
struct state cur_out __attribute__((aligned(64)));
struct { u32 offset; u16 selector; } __attribute__((packed, aligned(16))) far_target;
u64 host_rsp, host_fsbase, host_gsbase;
u32 default_mxcsr = 0x1f80;
static volatile int in_guest;
static volatile u32 watch_index, watch_seen;
static struct record *volatile current;

void enter_guest(void);
void landing(void);
void leave_guest(void);

asm(R"(
.text
.macro each_gpr op
  \op rax,0
  \op rcx,8
  \op rdx,16
  \op rbx,24
  \op rbp,40
  \op rsi,48
  \op rdi,56
  \op r8,64
  \op r9,72
  \op r10,80
  \op r11,88
  \op r12,96
  \op r13,104
  \op r14,112
  \op r15,120
.endm
.macro load_gpr reg,at
  movq cur_in+\at, %\reg
.endm
.macro save_gpr reg,at
  movq %\reg, cur_out+\at
.endm
.macro each_ymm op
  .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
  \op \n
  .endr
.endm
.macro load_ymm n
  vmovdqu cur_in+704+32*\n, %ymm\n
.endm
.macro save_ymm n
  vmovdqu %ymm\n, cur_out+704+32*\n
.endm

.globl enter_guest
enter_guest:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, host_rsp
  # The code was just written through another mapping: IRET serialises (Intel SDM vol. 3, "Serializing Instructions").
  movl %ss, %eax
  movq %rsp, %rcx
  pushq %rax
  pushq %rcx
  pushfq
  movl %cs, %eax
  pushq %rax
  pushq $1f
  iretq
1:
  movw cur_in+144, %es
  movw cur_in+150, %ds
  movw cur_in+152, %fs
  movw cur_in+154, %gs
  cmpw $3, cur_in+152
  ja 2f
  movq cur_in+160, %rax
  wrfsbase %rax
2:
  cmpw $3, cur_in+154
  ja 3f
  movq cur_in+168, %rax
  wrgsbase %rax
3:
  fxrstor64 cur_in+192
  each_ymm load_ymm
  pushq cur_in+136
  popfq
  movw cur_in+148, %ss
  movq cur_in+32, %rsp
  each_gpr load_gpr
  ljmp *far_target

.globl landing
landing:
  each_gpr save_gpr
  movq %rsp, cur_out+32
  movq host_rsp, %rsp
  pushfq
  popq cur_out+136
  pushq $2
  popfq
  movw %es, cur_out+144
  movw %ss, cur_out+148
  movw %ds, cur_out+150
  movw %fs, cur_out+152
  movw %gs, cur_out+154
  rdfsbase %rax
  movq %rax, cur_out+160
  rdgsbase %rax
  movq %rax, cur_out+168
  fxsave64 cur_out+192
  each_ymm save_ymm
.globl leave_guest
leave_guest:
  movq host_rsp, %rsp
  pushq $2
  popfq
  movl $0x2b, %eax
  movl %eax, %ss
  xorl %eax, %eax
  movl %eax, %ds
  movl %eax, %es
  movl %eax, %fs
  movl %eax, %gs
  movq host_fsbase, %rax
  wrfsbase %rax
  movq host_gsbase, %rax
  wrgsbase %rax
  fninit
  ldmxcsr default_mxcsr
  vzeroupper
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
)");

static void die(const char *what)
{
    dprintf(2, "oracle: %s: %s\n", what, strerror(errno));
    _exit(2);
}

static void copy(void *to, const void *from, size_t bytes)
{
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

// No libc here: FS may be the guest's, and so thread-local storage is out of reach.
static void on_signal(int signal, siginfo_t *info, void *context)
{
    (void)info;
    ucontext_t *uc = context;
    greg_t *g = uc->uc_mcontext.gregs;
    if (signal == SIGALRM) {
        // The same record at two ticks in a row: the code does not end.
        if (!in_guest || watch_seen != watch_index) {
            watch_seen = watch_index;
            return;
        }
    }
    if (!in_guest) {
        static const char text[] = "oracle: a signal outside the code under test\n";
        syscall(SYS_write, 2, text, sizeof text - 1);
        syscall(SYS_exit_group, 3);
    }
    static const u8 order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    for (int i = 0; i < 16; i++)
        cur_out.gpr[i] = g[order[i]];
    cur_out.rip = g[REG_RIP];
    cur_out.flags = g[REG_EFL];
    u64 selectors = g[REG_CSGSFS];
    u16 sel;
    asm("movw %%es, %0" : "=r"(sel));
    cur_out.sel[0] = sel;
    cur_out.sel[1] = (u16)selectors;
    cur_out.sel[2] = (u16)(selectors >> 48);
    asm("movw %%ds, %0" : "=r"(sel));
    cur_out.sel[3] = sel;
    asm("movw %%fs, %0" : "=r"(sel));
    cur_out.sel[4] = sel;
    asm("movw %%gs, %0" : "=r"(sel));
    cur_out.sel[5] = sel;
    asm volatile("rdfsbase %0" : "=r"(cur_out.fsbase));
    asm volatile("rdgsbase %0" : "=r"(cur_out.gsbase));
    u8 *fx = (u8 *)uc->uc_mcontext.fpregs;
    u64 present = *(u64 *)(fx + 512);
    copy(cur_out.fx, fx, 512);
    for (int i = 0; i < 16; i++) {
        u64 *to = (u64 *)(cur_out.ymm + 32 * i);
        u64 *low = (u64 *)(fx + 160 + 16 * i), *high = (u64 *)(fx + 576 + 16 * i);
        to[0] = present & 2 ? low[0] : 0;
        to[1] = present & 2 ? low[1] : 0;
        to[2] = present & 4 ? high[0] : 0;
        to[3] = present & 4 ? high[1] : 0;
    }
    if (!(present & 1)) {
        for (int i = 0; i < 160; i++)
            if (i < 24 || i >= 32)
                cur_out.fx[i] = 0;
        cur_out.fx[0] = 0x7f;
        cur_out.fx[1] = 0x03;
    }
    current->vector = signal == SIGALRM ? VECTOR_TIMEOUT : (u32)g[REG_TRAPNO];
    current->error = (u32)g[REG_ERR];
    current->cr2 = g[REG_CR2];
    in_guest = 0;
    // Leaving the alternate stack without sigreturn is allowed: the kernel looks at RSP, and no signal is masked (SA_NODEFER).
    leave_guest_from_signal:
    asm volatile("jmp leave_guest");
    goto leave_guest_from_signal;
}

static u64 mix(u64 hash, u64 word)
{
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
}

// Bits of a 64-byte line that differ, folded into the hash; the line is made pristine again.
static u64 take_changes(u8 *window, const u8 *pristine)
{
    u64 hash = 0;
    for (u32 page = 0; page < WINDOW_PAGES; page++) {
        if (!(page_rights[page] & PROT_READ) || page_rights[page] & PROT_EXEC)
            continue;
        for (u32 at = page * 4096; at < (page + 1) * 4096; at += 64) {
            u64 *a = (u64 *)(window + at);
            const u64 *b = (const u64 *)(pristine + at);
            u64 differs = 0;
            for (int i = 0; i < 8; i++)
                differs |= a[i] ^ b[i];
            if (!differs)
                continue;
            hash = mix(hash, at);
            for (int i = 0; i < 8; i++) {
                hash = mix(hash, a[i]);
                a[i] = b[i];
            }
        }
    }
    return hash;
}

static u32 make_landing(u8 *at, u32 linear, u32 mode)
{
    u32 target = (u32)(uintptr_t)landing;
    if (mode == 64) {
        at[0] = 0xe9;
        *(u32 *)(at + 1) = target - (linear + 5);
        return 5;
    }
    u32 length = 0;
    if (mode == 16)
        at[length++] = 0x66;
    at[length++] = 0xea;
    *(u32 *)(at + length) = target;
    *(u16 *)(at + length + 4) = user_code_64;
    return length + 6;
}

static void run(struct record *r, u8 *window, const u8 *pristine, int keep)
{
    u32 at = r->code_linear - WINDOW;
    copy(window + at, r->code, r->code_length);
    u32 end = at + r->code_length;
    u8 landing_code[16];
    u32 landing_length = make_landing(landing_code, WINDOW + end, r->mode);
    // A landing that would leave the code pages is left out: INT3 or the fault beyond them ends the run.
    if (end + landing_length > 2 * 4096)
        landing_length = 0;
    copy(window + end, landing_code, landing_length);
    copy(r->code + r->code_length, landing_code, landing_length);
    r->landing_length = landing_length;
    copy(window + (r->patch_linear - WINDOW), r->patch, r->patch_length);
    copy(&cur_in, &r->in, sizeof cur_in);
    far_target.offset = (u32)r->in.rip;
    far_target.selector = r->in.sel[1];
    r->vector = VECTOR_NONE;
    r->error = 0;
    r->cr2 = 0;
    current = r;
    cur_out.sel[1] = r->in.sel[1];
    cur_out.rip = r->in.rip + r->code_length;
    watch_index++;
    in_guest = 1;
    enter_guest();
    in_guest = 0;
    copy(&r->out, &cur_out, sizeof cur_out);
    u32 used = r->code_length + landing_length;
    for (u32 i = 0; i < used; i++)
        window[at + i] = 0xcc;
    if (!keep)
        r->hash = take_changes(window, pristine);
}

static void set_ldt(u32 entry, u32 base, u32 limit, int big, int contents, int read_only, int pages, int absent)
{
    struct user_desc d = {
        .entry_number = entry, .base_addr = base, .limit = limit, .seg_32bit = big, .contents = contents, .read_exec_only = read_only,
        .limit_in_pages = pages, .seg_not_present = absent, .useable = 0,
    };
    if (syscall(SYS_modify_ldt, 1, &d, sizeof d) != 0)
        die("modify_ldt");
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    int fd = open(argv[1], O_RDWR);
    if (fd < 0)
        die("open the shared file");
    off_t size = lseek(fd, 0, SEEK_END);
    u8 *file = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (file == MAP_FAILED)
        die("map the shared file");
    for (u32 page = 0; page < WINDOW_PAGES; page++) {
        void *want = (void *)(uintptr_t)(WINDOW + page * 4096);
        int rights = page_rights[page];
        void *got = mmap(want, 4096, rights, MAP_SHARED | MAP_FIXED_NOREPLACE | (rights ? MAP_POPULATE : 0), fd, FILE_WINDOW + page * 4096);
        if (got != want)
            die("map the window");
    }
    u8 *window = file + FILE_WINDOW;
    const u8 *pristine = file + FILE_PRISTINE;
    memcpy(window, pristine, WINDOW_SIZE);
    memset(window, 0xcc, 2 * 4096);
    for (u32 page = 0; page < WINDOW_PAGES; page++)
        if (page_rights[page] & PROT_READ)
            (void)*(volatile u8 *)(uintptr_t)(WINDOW + page * 4096);

    // The same descriptors are in Descriptors.cs.
    set_ldt(0, WINDOW, 0xffff, 0, 2, 0, 0, 0);    // 0007: 16-bit code, readable
    set_ldt(1, WINDOW, 0xffff, 0, 0, 0, 0, 0);    // 000F: 16-bit data, writable
    set_ldt(2, WINDOW, 0x8fff, 1, 0, 0, 0, 0);    // 0017: 32-bit data with a short limit
    set_ldt(3, WINDOW, 0xffff, 1, 0, 1, 0, 0);    // 001F: read-only data
    set_ldt(4, WINDOW, 0x33ff, 1, 1, 0, 0, 0);    // 0027: expand-down data
    set_ldt(5, WINDOW, 0xffff, 1, 0, 0, 0, 1);    // 002F: not present
    set_ldt(6, WINDOW, 0xffff, 1, 2, 1, 0, 0);    // 0037: 32-bit code, execute-only
    set_ldt(7, WINDOW, 0xffff, 1, 2, 0, 0, 0);    // 003F: 32-bit code, readable

    asm volatile("rdfsbase %0" : "=r"(host_fsbase));
    asm volatile("rdgsbase %0" : "=r"(host_gsbase));
    static u8 signal_stack[1 << 17] __attribute__((aligned(64)));
    stack_t alternate = {.ss_sp = signal_stack, .ss_size = sizeof signal_stack};
    if (sigaltstack(&alternate, NULL) != 0)
        die("sigaltstack");
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGALRM};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        if (sigaction(signals[i], &action, NULL) != 0)
            die("sigaction");
    struct itimerval tick = {.it_interval = {.tv_usec = 250000}, .it_value = {.tv_usec = 250000}};
    if (setitimer(ITIMER_REAL, &tick, NULL) != 0)
        die("setitimer");
    (void)user_data;

    struct record *records = (struct record *)(file + FILE_RECORDS);
    volatile u32 *progress = (volatile u32 *)file;
    u32 count;
    for (;;) {
        ssize_t got = read(0, &count, 4);
        if (got < 0 && errno == EINTR)
            continue;
        if (got != 4)
            return 0;
        // The top bit asks that the window keeps what the last record left there.
        int keep = count >> 31;
        count &= 0x7fffffff;
        if (keep)
            memcpy(window + 2 * 4096, pristine + 2 * 4096, WINDOW_SIZE - 2 * 4096);
        for (u32 i = 0; i < count; i++) {
            *progress = i;
            run(&records[i], window, pristine, keep);
        }
        if (write(1, &count, 4) != 4)
            return 1;
    }
}
