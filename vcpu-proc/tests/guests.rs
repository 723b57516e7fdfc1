//! What vcpu-proc promises about a running guest, seen with guests of a few instructions on the real /dev/kvm.

mod common;

use common::{Code, LOAD, Vm};
use ipc::vcpu::{VcpuEvent, VcpuRequest};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// A quadword of RAM that guests count in or leave results in.
const CELL: u64 = 0x30_0000;

/// mov [CELL + offset], rax
fn store_rax(code: Code, offset: u64) -> Code {
    code.bytes(&[0x48, 0xa3]).bytes(&(CELL + offset).to_le_bytes())
}

fn wait_for_count(vm: &Vm, more_than: u64) -> u64 {
    let start = std::time::Instant::now();
    loop {
        let count = vm.ram_u64(CELL);
        if count > more_than {
            return count;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "the guest makes no progress");
        std::thread::yield_now();
    }
}

#[test]
fn a_guest_prints_on_its_serial_port() {
    let Some(mut vm) = Vm::new(1) else { return };
    vm.boot(&Code::new().print("hello\n").halt().0);
    vm.run();
    assert_eq!(vm.read_serial(6), "hello\n");
}

#[test]
fn string_output_arrives_byte_by_byte() {
    let Some(mut vm) = Vm::new(1) else { return };
    let text = b"all at once";
    // lea rsi, [rip + text]; mov ecx, length; mov dx, 0x3f8; rep outsb; halt; text
    let code = Code::new()
        .bytes(&[0x48, 0x8d, 0x35, 15, 0, 0, 0])
        .bytes(&[0xb9, text.len() as u8, 0, 0, 0])
        .bytes(&[0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e])
        .halt();
    vm.boot(&code.bytes(text).0);
    vm.run();
    assert_eq!(vm.read_serial(text.len()), "all at once");
}

#[test]
fn the_guest_reads_what_the_peer_sends_and_its_hang_up_is_reported() {
    let Some(mut vm) = Vm::new(1) else { return };
    // again: mov dx, 0x3fd; wait: in al, dx; test al, 1; jz wait; mov dx, 0x3f8; in al, dx; inc al; out dx, al; jmp again
    let echo = [
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xfe, 0xc0, 0xee, 0xeb,
        0xed,
    ];
    vm.boot(&echo);
    vm.run();
    vm.serial.write_all(b"HAL").unwrap();
    assert_eq!(vm.read_serial(3), "IBM");
    vm.serial.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(vm.helper.event(), VcpuEvent::SerialClosed));
    vm.pause();
}

#[test]
fn every_way_to_reset_is_reported_and_nothing_runs_until_the_next_boot() {
    let Some(mut vm) = Vm::new(2) else { return };
    let ways: [(&str, Code); 3] = [
        ("keyboard controller", Code::new().out(0x64, 0xfe)),
        ("ACPI reset register", Code::new().out(0x602, 1)),
        // ud2 without an interrupt table.
        ("triple fault", Code::new().bytes(&[0x0f, 0x0b])),
    ];
    for (name, code) in ways {
        vm.ram.write_all_at(&[0; 8], CELL).unwrap();
        vm.boot(&Code::new().print("1").bytes(&code.0).count_forever(CELL).0);
        vm.run();
        assert_eq!(vm.read_serial(1), "1", "{name}");
        let event = vm.helper.event();
        assert!(matches!(event, VcpuEvent::GuestReset), "{name}: {event:?}");
        assert_eq!(vm.ram_u64(CELL), 0, "{name}: the guest ran on");
        assert_eq!(vm.registers().len(), 2, "{name}: the vCPUs are parked");
        vm.boot(&Code::new().print("2").halt().0);
        vm.run();
        assert_eq!(vm.read_serial(1), "2", "{name}");
        vm.pause();
    }
}

#[test]
fn a_guest_that_powers_off_is_reported_and_can_be_booted_again() {
    let Some(mut vm) = Vm::new(1) else { return };
    // SLP_EN with SLP_TYP 5.
    vm.boot(&Code::new().out(0x600, 0x34).count_forever(CELL).0);
    vm.run();
    assert!(matches!(vm.helper.event(), VcpuEvent::GuestShutdown));
    assert_eq!(vm.ram_u64(CELL), 0);
    vm.boot(&Code::new().print("again").halt().0);
    vm.run();
    assert_eq!(vm.read_serial(5), "again");
}

#[test]
fn a_panicking_guest_is_reported_and_stops_until_it_is_told_to_run_on() {
    let Some(mut vm) = Vm::new(1) else { return };
    let code = Code::new()
        .input(0x505)
        .bytes(&[0x04, b'0'])
        .print_al()
        .out(0x505, 2)
        .print("c")
        .out(0x505, 1)
        .count_forever(CELL);
    vm.boot(&code.0);
    vm.run();
    assert_eq!(vm.read_serial(2), "3c");
    assert!(matches!(
        vm.helper.event(),
        VcpuEvent::GuestPanicked { crash_loaded: true }
    ));
    assert!(matches!(
        vm.helper.event(),
        VcpuEvent::GuestPanicked { crash_loaded: false }
    ));
    assert_eq!(vm.registers().len(), 1, "the vCPU is parked");
    assert_eq!(vm.ram_u64(CELL), 0, "the guest ran on");
    vm.run();
    wait_for_count(&vm, 0);
}

#[test]
fn the_power_button_reaches_the_guest() {
    let Some(mut vm) = Vm::new(1) else { return };
    // wait: in al, dx (0x604); test al, al; jz wait
    let code = Code::new()
        .print("r")
        .input(0x604)
        .bytes(&[0x84, 0xc0, 0x74, 0xfb, 0x04, b'0'])
        .print_al()
        .halt();
    vm.boot(&code.0);
    vm.run();
    assert_eq!(vm.read_serial(1), "r");
    vm.done(VcpuRequest::PowerButton);
    assert_eq!(vm.read_serial(1), "1");
}

#[test]
fn pause_stops_the_guest_and_run_lets_it_go_on() {
    let Some(mut vm) = Vm::new(1) else { return };
    vm.boot(&Code::new().count_forever(CELL).0);
    vm.run();
    let mut count = 0;
    for _ in 0..20 {
        wait_for_count(&vm, count);
        vm.pause();
        count = vm.ram_u64(CELL);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(vm.ram_u64(CELL), count, "the guest runs while it is paused");
        let registers = vm.registers().remove(0);
        assert_eq!(registers.general[0], CELL);
        let code = LOAD + 16;
        assert!((code + 10..=code + 13).contains(&registers.rip), "{:#x}", registers.rip);
        // Pausing twice and running twice is harmless.
        vm.pause();
        vm.run();
        vm.run();
    }
}

#[test]
fn a_pause_completes_the_access_that_is_under_way() {
    let Some(mut vm) = Vm::new(1) else { return };
    // mov dx, 0x3fd; again: mov al, 0; in al, dx; done: inc qword [CELL]; jmp again
    let code = Code::new()
        .bytes(&[0x66, 0xba, 0xfd, 0x03, 0xbb])
        .bytes(&(CELL as u32).to_le_bytes())
        .bytes(&[0xb0, 0x00, 0xec, 0x48, 0xff, 0x03, 0xeb, 0xf8]);
    let done = LOAD + 16 + 12;
    vm.boot(&code.0);
    vm.run();
    let mut count = 0;
    for _ in 0..100 {
        count = wait_for_count(&vm, count);
        vm.pause();
        let registers = vm.registers().remove(0);
        let line_status = registers.general[0] & 0xff;
        match registers.rip {
            at if at == done => assert_eq!(line_status, 0x60, "the port was read and rax does not show it"),
            at => assert!((LOAD + 16..done + 6).contains(&at), "{at:#x}"),
        }
        vm.run();
    }
}

#[test]
fn registers_are_read_as_the_guest_left_them() {
    let Some(mut vm) = Vm::new(1) else { return };
    // mov r, imm64 for the sixteen in encoding order: rax rcx rdx rbx rsp rbp rsi rdi r8 … r15.
    let mut code = Code::new();
    for number in 0..16u8 {
        let value = 0x1111_1111_1111_1111u64.wrapping_mul(u64::from(number) + 1);
        code = code
            .bytes(&[if number < 8 { 0x48 } else { 0x49 }, 0xb8 + number % 8])
            .bytes(&value.to_le_bytes());
    }
    // mov byte [0x300000], 1 (by absolute address); jmp $
    let code = code.bytes(&[0xc6, 0x04, 0x25, 0x00, 0x00, 0x30, 0x00, 0x01, 0xeb, 0xfe]);
    let loop_at = LOAD + 16 + 16 * 10 + 8;
    vm.boot(&code.0);
    vm.run();
    wait_for_count(&vm, 0);
    vm.pause();
    let registers = vm.registers().remove(0);
    let by_encoding = |number: u64| 0x1111_1111_1111_1111u64.wrapping_mul(number + 1);
    let order = [0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];
    assert_eq!(registers.general, order.map(by_encoding));
    assert!([loop_at - 8, loop_at].contains(&registers.rip), "{:#x}", registers.rip);
    assert_eq!(registers.control[2], 0x9000, "cr3");
    assert_eq!(registers.efer & 0x500, 0x500, "long mode");
    let (code, data) = (registers.segments[0], registers.segments[1]);
    assert_eq!((code.selector, code.flags & 0x0020_f800), (0x10, 0x0020_9800));
    assert_eq!((data.selector, data.flags & 0xf000), (0x18, 0x9000));
    assert_eq!((registers.gdt.base, registers.gdt.limit), (0x500, 39));
}

#[test]
fn a_boot_resets_what_the_last_guest_left_in_the_processor() {
    let Some(mut vm) = Vm::new(1) else { return };
    // mov rax, imm; mov dr0, rax; mov r15, rax
    let spoil = Code::new()
        .bytes(&[0x48, 0xb8])
        .bytes(&0x1234_5678u64.to_le_bytes())
        .bytes(&[0x0f, 0x23, 0xc0, 0x49, 0x89, 0xc7])
        .out(0x602, 1);
    vm.boot(&spoil.0);
    vm.run();
    assert!(matches!(vm.helper.event(), VcpuEvent::GuestReset));
    // mov rax, dr0; mov [CELL], rax; mov rax, r15; mov [CELL + 8], rax
    vm.ram.write_all_at(&[0xff; 16], CELL).unwrap();
    let code = store_rax(Code::new().bytes(&[0x0f, 0x21, 0xc0]), 0).bytes(&[0x4c, 0x89, 0xf8]);
    vm.boot(&store_rax(code, 8).print("x").halt().0);
    vm.run();
    assert_eq!(vm.read_serial(1), "x");
    assert_eq!((vm.ram_u64(CELL), vm.ram_u64(CELL + 8)), (0, 0));
}

#[test]
fn other_processors_start_when_they_are_told_to_and_again_after_a_reset() {
    let Some(mut vm) = Vm::new(4) else { return };
    // In real mode at 0x8000: print 'A'; halt.
    let other = [0xb0, b'A', 0xba, 0xf8, 0x03, 0xee, 0xf4, 0xeb, 0xfd];
    // mov rbx, ICR; INIT and start-up IPI with vector 8 to all but this one.
    let code = Code::new()
        .bytes(&[0x48, 0xbb])
        .bytes(&0xfee0_0300u64.to_le_bytes())
        .bytes(&[0xc7, 0x03])
        .bytes(&0x000c_4500u32.to_le_bytes())
        .bytes(&[0xc7, 0x03])
        .bytes(&0x000c_4608u32.to_le_bytes())
        .halt();
    for _ in 0..2 {
        vm.boot(&code.0);
        vm.ram.write_all_at(&other, 0x8000).unwrap();
        vm.run();
        assert_eq!(vm.read_serial(3), "AAA");
        vm.pause();
        let registers = vm.registers();
        assert!(registers[1..].iter().all(|vcpu| vcpu.segments[0].selector == 0x800));
    }
}

#[test]
fn a_machine_may_have_255_processors() {
    let Some(mut vm) = Vm::new(255) else { return };
    assert_eq!(vm.thread_ids.len(), 255);
    vm.boot(&Code::new().print("many").count_forever(CELL).0);
    vm.run();
    assert_eq!(vm.read_serial(4), "many");
    for _ in 0..3 {
        vm.pause();
        assert_eq!(vm.registers().len(), 255);
        vm.run();
    }
}

#[test]
fn a_processor_that_cannot_go_on_is_reported_with_its_state() {
    let Some(mut vm) = Vm::new(2) else { return };
    // mov rax, 0xd0000000; jmp rax: nothing is there to fetch.
    let code = Code::new()
        .bytes(&[0x48, 0xb8])
        .bytes(&0xd000_0000u64.to_le_bytes())
        .bytes(&[0xff, 0xe0]);
    vm.boot(&code.0);
    vm.run();
    let VcpuEvent::VcpuFailed { vcpu: 0, detail } = vm.helper.event() else {
        panic!("another event");
    };
    assert!(detail.starts_with("KVM_EXIT_INTERNAL_ERROR: "), "{detail}");
    assert!(detail.contains("rip 0xd0000000") && !detail.contains('\n'), "{detail}");
    vm.boot(&Code::new().print("ok").halt().0);
    vm.run();
    assert_eq!(vm.read_serial(2), "ok");
}
