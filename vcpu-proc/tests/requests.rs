//! What vcpu-proc promises about the supervisor's requests: their order, what they refuse, and what the process still holds
//! when it is sealed.

mod common;

use common::{Code, RAM, Vm, flat, kvm, memory, setup_request, start};
use ipc::caps::{CallFd, KickFd};
use ipc::vcpu::{CpuFeature, KernelFormat, VcpuEvent, VcpuReply, VcpuRequest};
use ipc::virtio::{DeviceIndex, DeviceKind, QueueFds};
use vmm_sys_util::eventfd::EventFd;

fn queue() -> QueueFds {
    let event = || -> std::os::fd::OwnedFd {
        use std::os::fd::{FromRawFd, IntoRawFd};
        // SAFETY: the descriptor was just made and is given away.
        unsafe { std::os::fd::OwnedFd::from_raw_fd(EventFd::new(0).unwrap().into_raw_fd()) }
    };
    QueueFds {
        kick: KickFd::new(event()),
        call: CallFd::new(event()),
    }
}

fn add_device(number: u8, slot: u8, queues: u16) -> VcpuRequest {
    VcpuRequest::AddDevice {
        device: DeviceIndex(number),
        kind: DeviceKind::Rng,
        slot,
        queues,
        queue_size: 256,
    }
}

fn refused(reply: Result<VcpuReply, ipc::Failure>) -> String {
    match reply {
        Err(failure) => {
            assert!(!failure.message.contains('\n'), "{failure}");
            failure.message
        }
        Ok(reply) => panic!("not refused: {reply:?}"),
    }
}

#[test]
fn requests_out_of_order_are_refused_and_change_nothing() {
    let Some(kvm) = kvm() else { return };
    let mut helper = start();
    for request in [VcpuRequest::Seal, VcpuRequest::Run, add_device(0, 1, 1)] {
        assert_eq!(refused(helper.ask(request)), "Setup comes first");
    }
    let ram = memory(RAM);
    helper.ask(setup_request(kvm, &ram, 1, Vec::new())).expect("Setup");
    for request in [VcpuRequest::Run, VcpuRequest::GetRegisters, VcpuRequest::Pause] {
        assert_eq!(
            refused(helper.ask(request)),
            "Seal comes before anything else is done with the machine"
        );
    }
    let again = setup_request(common::kvm().unwrap(), &ram, 1, Vec::new());
    assert_eq!(refused(helper.ask(again)), "the machine is set up already");
    let Ok(VcpuReply::Sealed { .. }) = helper.ask(VcpuRequest::Seal) else {
        panic!("not sealed")
    };
    for request in [VcpuRequest::Seal, add_device(0, 1, 1)] {
        assert_eq!(
            refused(helper.ask(request)),
            "the machine is sealed: nothing can be added to it"
        );
    }
    assert_eq!(
        refused(helper.ask(VcpuRequest::Run)),
        "there is no kernel to run: Boot comes first"
    );
}

#[test]
fn what_needs_parked_processors_is_refused_while_they_run() {
    let Some(mut vm) = Vm::new(1) else { return };
    vm.boot(&Code::new().print("x").halt().0);
    vm.run();
    let image = flat(&Code::new().halt().0);
    let running = "the vCPUs run: Pause comes first";
    assert_eq!(vm.try_boot(&image, None, "").unwrap_err().message, running);
    assert_eq!(refused(vm.helper.ask(VcpuRequest::GetRegisters)), running);
    vm.pause();
    vm.try_boot(&image, None, "").unwrap();
}

#[test]
fn a_nonmaskable_interrupt_reaches_halted_processors_leaves_parked_ones_parked_and_does_not_outlive_a_reset() {
    let Some(mut vm) = Vm::new(2) else { return };
    vm.boot(&Code::new().print("a").halt().0);
    vm.run();
    assert_eq!(vm.read_serial(1), "a");
    // The guest has no interrupt table: the interrupt is its end.
    vm.done(VcpuRequest::InjectNmi);
    assert!(matches!(vm.helper.event(), VcpuEvent::GuestReset));
    vm.boot(&Code::new().print("b").halt().0);
    vm.done(VcpuRequest::InjectNmi);
    assert_eq!(vm.registers().len(), 2, "the vCPUs are parked");
    vm.boot(&Code::new().print("c").halt().0);
    vm.run();
    assert_eq!(vm.read_serial(1), "c");
    vm.pause();
}

#[test]
fn machines_that_cannot_be_are_refused_by_name() {
    let feature = |name: &str, on| {
        vec![CpuFeature {
            name: name.to_owned(),
            on,
        }]
    };
    for (vcpus, ram_bytes, features, reason) in [
        (0, RAM, vec![], "a machine has 1 to 255 vCPUs, not 0"),
        (256, RAM, vec![], "a machine has 1 to 255 vCPUs, not 256"),
        (1, 4096, vec![], "RAM of 4096 bytes is not possible"),
        (1, RAM + 1, vec![], "RAM of 67108865 bytes is not possible"),
        (
            1,
            RAM,
            feature("no-such-thing", false),
            "unknown CPU feature \"no-such-thing\"",
        ),
        (
            1,
            RAM,
            feature("ia64", true),
            "this host cannot give the guest the CPU feature \"ia64\"",
        ),
    ] {
        let Some(kvm) = kvm() else { return };
        let reply = start().ask(setup_request(kvm, &memory(ram_bytes), vcpus, features));
        let message = refused(reply);
        assert!(message.starts_with(reason), "{message}");
    }
    let Some(kvm) = kvm() else { return };
    let off = feature("avx2", false);
    start()
        .ask(setup_request(kvm, &memory(RAM), 1, off))
        .expect("switching a feature off");
}

#[test]
fn devices_are_checked_when_they_are_added() {
    let Some(kvm) = kvm() else { return };
    let mut helper = start();
    helper
        .ask(setup_request(kvm, &memory(RAM), 1, Vec::new()))
        .expect("Setup");
    helper.ask(add_device(0, 1, 2)).expect("AddDevice");
    refused(helper.ask(add_device(0, 2, 1)));
    refused(helper.ask(add_device(200, 2, 1)));
    refused(helper.ask(add_device(1, 1, 1)));
    refused(helper.ask(add_device(1, 0, 1)));
    refused(helper.ask(add_device(1, 32, 1)));
    refused(helper.ask(add_device(1, 2, 1000)));
    let queues = |number, count| VcpuRequest::AddQueues {
        device: DeviceIndex(number),
        queues: (0..count).map(|_| queue()).collect(),
    };
    refused(helper.ask(queues(7, 1)));
    helper.ask(queues(0, 1)).expect("AddQueues");
    assert_eq!(
        refused(helper.ask(VcpuRequest::Seal)),
        "device 0 lacks eventfds of its queues"
    );
    refused(helper.ask(queues(0, 2)));
    helper.ask(queues(0, 1)).expect("AddQueues");
    helper.ask(VcpuRequest::Seal).expect("Seal");
    refused(helper.ask(VcpuRequest::DeviceReset { device: DeviceIndex(1) }));
    helper
        .ask(VcpuRequest::DeviceReset { device: DeviceIndex(0) })
        .expect("an answer that nobody waited for");
}

#[test]
fn a_sealed_process_holds_neither_dev_kvm_nor_the_memory_file() {
    let Some(mut vm) = Vm::new(3) else { return };
    vm.boot(&Code::new().halt().0);
    let process = format!("/proc/{}", vm.helper.child.id());
    let mut links: Vec<String> = std::fs::read_dir(format!("{process}/fd"))
        .unwrap()
        .map(|entry| {
            let link = std::fs::read_link(entry.unwrap().path()).unwrap();
            link.to_string_lossy().trim_end_matches(char::is_numeric).to_owned()
        })
        .collect();
    links.sort();
    let count = |name: &str| links.iter().filter(|link| link.starts_with(name)).count();
    assert_eq!(count("anon_inode:kvm-vm"), 1, "{links:?}");
    assert_eq!(count("anon_inode:kvm-vcpu:"), 3, "{links:?}");
    // Outbox, serial thread, serial interrupt, power button interrupt.
    assert_eq!(count("anon_inode:[eventfd]"), 4, "{links:?}");
    // Channel, log twice, serial port twice.
    assert_eq!(count("socket:["), 5, "{links:?}");
    for closed in ["/dev/kvm", "/memfd:", "anon_inode:seccomp"] {
        assert_eq!(count(closed), 0, "{links:?}");
    }

    for task in std::fs::read_dir(format!("{process}/task")).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        // The bare harness loads no launcher's and no start-up filter.
        assert!(status.contains("Seccomp_filters:\t2"), "{status}");
    }
    let mut threads: Vec<i32> = std::fs::read_dir(format!("{process}/task"))
        .unwrap()
        .map(|task| task.unwrap().file_name().to_string_lossy().parse().unwrap())
        .collect();
    threads.retain(|thread| !vm.thread_ids.contains(thread));
    assert_eq!(threads.len(), 2, "all but the control and serial threads are vCPUs");
}

#[test]
fn a_kernel_that_is_refused_leaves_the_machine_ready_for_another() {
    let Some(mut vm) = Vm::new(1) else { return };
    for (image, reason) in [
        (vec![], "the kernel image is truncated: it has 0 bytes"),
        (vec![0; 10_000], "the kernel image is of no known format"),
        (
            b"BHFLAT64\xff\xff\xff\xff\xff\xff\xff\xff\xf4".to_vec(),
            "the kernel image does not fit",
        ),
        (b"\x7fELF".to_vec(), "the kernel image is truncated"),
    ] {
        let message = vm.try_boot(&image, None, "").unwrap_err().message;
        assert!(message.starts_with(reason), "{message}");
        assert_eq!(
            refused(vm.helper.ask(VcpuRequest::Run)),
            "there is no kernel to run: Boot comes first"
        );
    }
    vm.boot(&Code::new().print("fine").halt().0);
    vm.run();
    assert_eq!(vm.read_serial(4), "fine");
}

#[test]
fn an_elf_kernel_starts_in_32_bit_mode_with_its_start_info() {
    let Some(mut vm) = Vm::new(1) else { return };
    // cmp dword [ebx], magic; jne $; mov eax, [ebx + 24] (command line); mov al, [eax]; print it
    let code = Code::new()
        .bytes(&[0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x75, 0xfe])
        .bytes(&[0x8b, 0x43, 24, 0x8a, 0x00])
        .print_al()
        .print("VH")
        .halt()
        .0;
    let mut image = vec![0; 0x200];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0]);
    put(32, &64u64.to_le_bytes());
    put(54, &[56, 0, 2, 0]);
    for (at, kind, values) in [
        (64, 1u32, [0x200u64, 0, 0x20_0000, code.len() as u64, 0x1000]),
        (120, 4, [0x180, 0, 0, 20, 20]),
    ] {
        put(at, &kind.to_le_bytes());
        for (value, offset) in values.iter().zip((8..).step_by(8)) {
            put(at + offset, &value.to_le_bytes());
        }
    }
    put(0x180, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
    put(0x190, &0x20_0000u32.to_le_bytes());
    image.extend(code);
    assert_eq!(vm.try_boot(&image, None, "P").unwrap(), KernelFormat::Pvh);
    vm.run();
    assert_eq!(vm.read_serial(3), "PVH");
}

#[test]
fn a_bzimage_starts_in_64_bit_mode_with_its_zero_page() {
    let Some(mut vm) = Vm::new(1) else { return };
    // mov al, [rsi + 0x1e8] (entries of the memory map); add al, '0'; print; mov eax, [rsi + 0x218] (initrd);
    // mov al, [rax]; print
    let code = Code::new()
        .bytes(&[0x8a, 0x86, 0xe8, 0x01, 0x00, 0x00, 0x04, b'0'])
        .print_al()
        .bytes(&[0x8b, 0x86, 0x18, 0x02, 0x00, 0x00, 0x8a, 0x00])
        .print_al()
        .halt()
        .0;
    let mut image = vec![0; 2 * 512 + 0x400];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &0x40u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &[1]);
    put(0x238, &[0xff, 0x07]);
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    put(0x400 + 0x200, &code);
    assert_eq!(
        vm.try_boot(&image, Some(b"initrd"), "quiet").unwrap(),
        KernelFormat::BzImage
    );
    vm.run();
    assert_eq!(vm.read_serial(2), "5i");
}

#[test]
fn a_virtio_device_is_found_by_ports_and_by_ecam() {
    let vm = Vm::with(1, RAM, |helper| {
        helper.ask(add_device(0, 3, 1)).expect("AddDevice");
        helper
            .ask(VcpuRequest::AddQueues {
                device: DeviceIndex(0),
                queues: vec![queue()],
            })
            .expect("AddQueues");
    });
    let Some(mut vm) = vm else { return };
    // mov eax, 0x80001800; mov dx, 0xcf8; out dx, eax; mov dx, 0xcfc; in eax, dx; mov [0x300000], eax;
    // mov ebx, 0xe0018000; mov eax, [rbx]; mov [0x300004], eax
    let code = Code::new()
        .bytes(&[0xb8, 0x00, 0x18, 0x00, 0x80, 0x66, 0xba, 0xf8, 0x0c, 0xef])
        .bytes(&[0x66, 0xba, 0xfc, 0x0c, 0xed, 0x89, 0x04, 0x25, 0x00, 0x00, 0x30, 0x00])
        .bytes(&[
            0xbb, 0x00, 0x80, 0x01, 0xe0, 0x8b, 0x03, 0x89, 0x04, 0x25, 0x04, 0x00, 0x30, 0x00,
        ])
        .print("x")
        .halt();
    vm.boot(&code.0);
    vm.run();
    assert_eq!(vm.read_serial(1), "x");
    assert_eq!(vm.ram_u64(0x30_0000), 0x1044_1af4_1044_1af4);
}

#[test]
fn the_acpi_root_pointer_lies_where_operating_systems_look() {
    let Some(mut vm) = Vm::new(2) else { return };
    vm.boot(&Code::new().halt().0);
    assert_eq!(&vm.ram_u64(0xe_0000).to_le_bytes(), b"RSD PTR ");
}
