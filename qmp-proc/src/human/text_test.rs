use super::*;
use ipc::qmp::KvmInfo;
use ipc::vcpu::{Segment, VcpuRegisters};

fn dump(bytes: &[u8], address: u64, count: u32, style: Style, item_bytes: u32) -> String {
    let layout = MemoryLayout {
        address,
        count,
        style,
        item_bytes,
    };
    write(&HumanReply::Bytes(bytes.to_vec()), Layout::Memory(layout))
}

/// The bytes at the end of a PC's ROM, and how they are shown.
const ROM: [u8; 16] = [
    0xea, 0x5b, 0xe0, 0, 0xf0, b'0', b'6', b'/', b'2', b'3', b'/', b'9', b'9', 0, 0xfc, 0,
];

#[test]
fn memory_has_the_layout_that_programs_read() {
    use Style::{Character, Hexadecimal, Octal, Signed, Unsigned};
    for (count, style, item_bytes, expected) in [
        (3, Hexadecimal, 1, "00000000fffffff0: 0xea 0x5b 0xe0\r\n"),
        (
            2,
            Hexadecimal,
            8,
            "00000000fffffff0: 0x2f3630f000e05bea 0x00fc0039392f3332\r\n",
        ),
        (3, Signed, 1, "00000000fffffff0: 234  91 224\r\n"),
        (3, Octal, 4, "00000000fffffff0:   070055752 05715430360 07113631462\r\n"),
        (3, Unsigned, 4, "00000000fffffff0:   14703594  792080624  959394610\r\n"),
        (
            8,
            Signed,
            2,
            "00000000fffffff0: 23530   224 12528 12086 13106 14639    57   252\r\n",
        ),
        (
            20,
            Character,
            1,
            "00000000fffffff0: '\\xea' '[' '\\xe0' '\\x00' '\\xf0' '0' '6' '/'\r\n\
             00000000fffffff8: '2' '3' '/' '9' '9' '\\x00' '\\xfc' '\\x00'\r\n\
             0000000100000000: Cannot access memory\r\n",
        ),
    ] {
        assert_eq!(dump(&ROM, 0xffff_fff0, count, style, item_bytes), expected);
    }
    let negative = 0x8d66_6700_8416_8a26_u64.to_le_bytes();
    assert_eq!(
        dump(&negative, 0xffff_ff10, 1, Signed, 8),
        "00000000ffffff10: -8257799614823495130\r\n"
    );
    assert_eq!(
        dump(&negative, 0xffff_ff10, 1, Unsigned, 8),
        "00000000ffffff10: 10188944458886056486\r\n"
    );
    assert_eq!(dump(&[0; 2], 0, 2, Octal, 1), "0000000000000000:   0   0\r\n");
}

#[test]
fn states_are_said_in_words() {
    for (running, status, text) in [
        (true, RunState::Running, "VM status: running\r\n"),
        (false, RunState::Paused, "VM status: paused\r\n"),
        (false, RunState::Prelaunch, "VM status: paused (prelaunch)\r\n"),
        (false, RunState::GuestPanicked, "VM status: paused (guest-panicked)\r\n"),
    ] {
        let reply = HumanReply::Status(StatusInfo {
            running,
            status,
            helper_restarts: None,
            policy_violations: None,
        });
        assert_eq!(write(&reply, Layout::Plain), text);
    }
    let kvm = KvmInfo {
        enabled: true,
        present: true,
    };
    assert_eq!(write(&HumanReply::Kvm(kvm), Layout::Plain), "kvm support: enabled\r\n");
    assert_eq!(write(&HumanReply::Translated(Some(0)), Layout::Plain), "gpa: 0x0\r\n");
    assert_eq!(write(&HumanReply::Translated(None), Layout::Plain), "Unmapped\r\n");
}

#[test]
fn a_processor_after_reset_shows_16_bit_registers() {
    let real = |selector, base, flags| Segment {
        selector,
        base,
        limit: 0xffff,
        flags,
    };
    let data = real(0, 0, 0x9300);
    let mut registers = VcpuRegisters {
        rip: 0xfff0,
        rflags: 2,
        segments: [
            real(0xf000, 0xffff_0000, 0x9b00),
            data,
            data,
            data,
            data,
            data,
            real(0, 0, 0x8200),
            real(0, 0, 0x8b00),
        ],
        gdt: real(0, 0, 0),
        idt: real(0, 0, 0),
        control: [0x6000_0010, 0, 0, 0],
        halted: true,
        ..VcpuRegisters::default()
    };
    registers.general[3] = 0x60fb1;
    assert_eq!(
        write(&HumanReply::Registers(vec![(1, registers)]), Layout::Plain),
        "\r\nCPU#1\r\n\
         EAX=00000000 EBX=00000000 ECX=00000000 EDX=00060fb1\r\n\
         ESI=00000000 EDI=00000000 EBP=00000000 ESP=00000000\r\n\
         EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=1\r\n\
         ES =0000 00000000 0000ffff 00009300\r\n\
         CS =f000 ffff0000 0000ffff 00009b00\r\n\
         SS =0000 00000000 0000ffff 00009300\r\n\
         DS =0000 00000000 0000ffff 00009300\r\n\
         FS =0000 00000000 0000ffff 00009300\r\n\
         GS =0000 00000000 0000ffff 00009300\r\n\
         LDT=0000 00000000 0000ffff 00008200\r\n\
         TR =0000 00000000 0000ffff 00008b00\r\n\
         GDT=     00000000 0000ffff\r\n\
         IDT=     00000000 0000ffff\r\n\
         CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000\r\n\
         EFER=0000000000000000\r\n"
    );
}
