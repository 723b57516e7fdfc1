// Everything that runs in ring 0, and the tables it needs. As little as possible: under some KVM implementations
// (without hardware virtualisation) each instruction here is interpreted, about 1 us each, and SSE faults; ring 3 runs
// natively there. So the page tables are complete in the image, and the entry goes to ring 3 after ~25 instructions.
//
// Selectors: 0x10 kernel code, 0x18 kernel data, 0x2b user data, 0x33 user code, 0x40 + 16*cpu task state segments.

    .set USER_DATA, 0x2b
    .set USER_CODE, 0x33
    .set USER_FLAGS, 0x3002             // IOPL 3, interrupts off
    .set CR4_BITS, 0x620                // PAE, OSFXSR, OSXMMEXCPT
    .set CR0_BITS, 0x80000033           // PG, NE, ET, MP, PE
    .set EFER, 0xc0000080
    .set TASK_LIMIT, 104 + 8192         // task state segment with all of the port bitmap

// --- The flat image's header; its entry point follows at once ------------------------------------------------------
    .section .flat_header, "ax"
    .ascii "BHFLAT64"
    .quad image_start
    .code64
flat_entry:
    cld
    mov rdi, rsi
    lea rsp, [boot_stack_top]
    lgdt [gdt_pointer]
    mov eax, CR4_BITS
    mov cr4, rax
    lea rax, [page_map]
    mov cr3, rax
    mov eax, CR0_BITS
    mov cr0, rax
    push 0x10
    lea rax, [long_entry]
    push rax
    retfq

// --- The PVH entry: 32-bit protected mode, paging off, start info in ebx -------------------------------------------
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .balign 4
    .long pvh_entry

    .section .text.boot, "ax"
    .code32
    .global pvh_entry
pvh_entry:
    cli
    cld
    mov edi, ebx
    lgdt [gdt_pointer]
    mov eax, CR4_BITS
    mov cr4, eax
    lea eax, [page_map]
    mov cr3, eax
    mov ecx, EFER
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, CR0_BITS
    mov cr0, eax
    .byte 0xea                          // far jump
    .long long_entry
    .word 0x10

    .code64
long_entry:
    lea rsp, [boot_stack_top]
    mov eax, 0x18
    mov ss, eax
    mov eax, USER_DATA
    mov ds, eax
    mov es, eax
    lea eax, [boot_tss]                 // the descriptor's base is scattered, so no relocation can fill it
    mov [boot_tss_descriptor + 2], ax
    shr eax, 16
    mov [boot_tss_descriptor + 4], al
    mov [boot_tss_descriptor + 7], ah
    mov eax, 0x40
    ltr ax
    lidt [idt_pointer]
    push USER_DATA
    lea rax, [user_stack_top - 8]
    push rax
    push USER_FLAGS
    push USER_CODE
    lea rax, [boot_processor_start]
    push rax
    iretq

// --- Application processors: copied to AP_TRAMPOLINE, entered there in real mode ------------------------------------
    .global ap_trampoline, ap_trampoline_end
    .code16
ap_trampoline:
    cli
    cld
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16        // lgdt with a 32-bit base, [disp16]
    .word ap_gdt_pointer - ap_trampoline
    mov eax, CR4_BITS
    mov cr4, eax
    mov eax, offset page_map
    mov cr3, eax
    mov ecx, EFER
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, CR0_BITS
    mov cr0, eax
    .byte 0x66, 0xea                    // far jump, 32-bit offset: straight from real to long mode
    .long ap_long_entry
    .word 0x10
    .balign 4
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_trampoline_end:

    .code64
ap_long_entry:
    mov eax, 0x18
    mov ss, eax
    mov eax, USER_DATA
    mov ds, eax
    mov es, eax
    mov rsp, [ap_mailbox]               // this processor's ring-0 stack
    mov eax, [ap_mailbox + 16]
    ltr ax
    lidt [idt_pointer]
    mov rdi, [ap_mailbox + 24]          // its index
    push USER_DATA
    push qword ptr [ap_mailbox + 8]     // its ring-3 stack
    push USER_FLAGS
    push USER_CODE
    lea rax, [application_processor_start]
    push rax
    iretq

// --- Interrupts: count, acknowledge, return. 32 bytes for each vector from 32 on -----------------------------------
    .macro interrupt_stub vector
    .balign 32
    lock inc qword ptr [interrupt_counts + 8 * \vector]
    .byte 0x67, 0xc7, 0x04, 0x25        // mov dword ptr [LAPIC EOI], 0 with a zero-extended 32-bit address
    .long 0xfee000b0, 0
    iretq
    .endm

    .balign 32
    .global interrupt_stubs
interrupt_stubs:
    .set vector, 32
    .rept 223
    interrupt_stub vector
    .set vector, vector + 1
    .endr
    .balign 32                          // vector 255 is the LAPIC's spurious interrupt: no acknowledgement
    iretq

// --- Exceptions: 16 bytes for each vector below 32 -----------------------------------------------------------------
    .macro exception_stub vector
    .balign 16
    .if (0x227d00 >> \vector) & 1       // 8, 10 to 14, 17 and 21 push an error code
    .else
    push 0
    .endif
    push \vector
    jmp exception_common
    .endm

    .balign 32
    .global exception_stubs
exception_stubs:
    .set vector, 0
    .rept 32
    exception_stub vector
    .set vector, vector + 1
    .endr

// A general protection fault of ring 3 on hlt is its way to have that instruction executed.
exception_common:
    cmp dword ptr [rsp], 13
    jne 9f
    cmp dword ptr [rsp + 8], 0
    jne 9f
    xchg rdi, [rsp]                     // the vector's place keeps ring 3's rdi
    mov rdi, [rsp + 16]
    cmp byte ptr [rdi], 0xf4
    je 1f
    mov dword ptr [rsp], 13
9:  pop rdi                             // vector, error code, instruction pointer, address: report it in ring 3
    pop rsi
    pop rdx
    mov rcx, cr2
    push USER_DATA
    lea rax, [exception_stack_top - 8]
    push rax
    push USER_FLAGS
    push USER_CODE
    lea rax, [exception_report]
    push rax
    iretq
1:  pop rdi
    add rsp, 8
    inc qword ptr [rsp]
    sti                                 // takes effect after hlt has begun: no wake-up can be lost
    hlt
    iretq

// --- Tables ---------------------------------------------------------------------------------------------------------
    .section .data.page_tables, "aw"
    .balign 4096
    .global page_map
page_map:                               // 4 GiB, identity, 2 MiB pages, ring 3 may do everything
    .quad page_pointers + 0x27
    .fill 511, 8, 0
page_pointers:
    .quad page_directories + 0x0027
    .quad page_directories + 0x1027
    .quad page_directories + 0x2027
    .quad page_directories + 0x3027
    .fill 508, 8, 0
page_directories:
    .set page, 0
    .rept 2048
    .quad page + 0xe7
    .set page, page + 0x200000
    .endr

    .section .data.boot, "aw"
    .balign 16
    .global gdt, idt, interrupt_counts, ap_mailbox
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff            // 0x10 kernel code
    .quad 0x00cf93000000ffff            // 0x18 kernel data
    .quad 0
    .quad 0x00cff3000000ffff            // 0x28 user data
    .quad 0x00affb000000ffff            // 0x30 user code
    .quad 0
boot_tss_descriptor:                    // 0x40, then one for each application processor
    .quad 0x0000890000000000 + TASK_LIMIT, 0
    .fill 510, 8, 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 8
idt_pointer:
    .word 4095
    .quad idt
    .balign 8
boot_tss:
    .long 0
    .quad boot_stack_top
    .fill 90, 1, 0
    .word 104                           // the bitmap of forbidden ports, none: not every monitor keeps IOPL
    .fill 8192, 1, 0
    .byte 0xff
    .balign 8
ap_mailbox:                             // ring-0 stack, ring-3 stack, task selector, index
    .quad 0, 0, 0, 0
    .balign 16
idt:
    .fill 512, 8, 0
interrupt_counts:
    .fill 256, 8, 0
    .fill 1024, 1, 0
    .balign 16
boot_stack_top:
    .fill 4096, 1, 0
exception_stack_top:
    .fill 65536, 1, 0
user_stack_top:
