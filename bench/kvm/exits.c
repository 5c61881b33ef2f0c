/* The least that can be done for one port-I/O exit: real-mode guest code in a loop, a C program around KVM_RUN that touches the written byte.
   Prints nanoseconds per exit. Usage: exits COUNT */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static const unsigned char code[] = {0xe6, 0x80, 0xeb, 0xfc}; /* out 80h, al; jmp -4 */
static volatile unsigned char sink;

static void die(const char *what) { perror(what); exit(1); }

int main(int argc, char **argv)
{
    long count = argc > 1 ? atol(argv[1]) : 20000;
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) die("/dev/kvm");
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    unsigned char *memory = mmap(0, 0x10000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = {.memory_size = 0x10000, .userspace_addr = (unsigned long)memory};
    memcpy(memory + 0x1000, code, sizeof code);
    if (vm < 0 || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region)) die("VM");
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    struct kvm_run *run = mmap(0, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
    if (vcpu < 0 || run == MAP_FAILED || ioctl(vcpu, KVM_GET_SREGS, &sregs)) die("vCPU");
    sregs.cs.base = sregs.cs.selector = 0;
    if (ioctl(vcpu, KVM_SET_SREGS, &sregs) || ioctl(vcpu, KVM_SET_REGS, &regs)) die("registers");
    struct timespec a, b;
    for (long i = -count / 10; i < count; i++) {
        if (i == 0) clock_gettime(CLOCK_MONOTONIC, &a);
        if (ioctl(vcpu, KVM_RUN, 0) || run->exit_reason != KVM_EXIT_IO) die("KVM_RUN");
        sink = ((unsigned char *)run)[run->io.data_offset];
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("%.0f\n", ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec)) / count);
}
