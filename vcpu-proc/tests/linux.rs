//! A stock Linux kernel, without any root file system: it finds its processors, its clock, the serial port's interrupt
//! and PCI, fails to mount a root, and resets the machine. Needs hardware virtualisation and a Debian kernel.

mod common;

use bulkhead_tests::lab::pieces::Kernel;
use common::Vm;
use ipc::vcpu::{KernelFormat, VcpuEvent};
use std::io::Read;

const VCPUS: u16 = 2;
const RAM: u64 = 512 << 20;

#[test]
fn a_stock_kernel_boots_twice_and_resets_the_machine() {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !cpuinfo.contains(" vmx") && !cpuinfo.contains(" svm") {
        eprintln!("skipped: this machine has no hardware virtualisation");
        return;
    }
    let image = match Kernel::find() {
        Ok(kernel) => std::fs::read(kernel.image).expect("reading the kernel"),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return;
        }
    };
    let Some(mut vm) = Vm::with(VCPUS, RAM, |_| {}) else {
        return;
    };
    for _ in 0..2 {
        let format = vm.try_boot(&image, None, "console=ttyS0 panic=1").expect("Boot");
        assert_eq!(format, KernelFormat::BzImage);
        vm.run();
        let mut log = String::new();
        let mut buffer = [0; 4096];
        while !log.contains("Rebooting") {
            match vm.serial.read(&mut buffer) {
                Ok(count) if count > 0 => log.push_str(&String::from_utf8_lossy(&buffer[..count])),
                other => panic!("{other:?} after: {log}\n{:?}", vm.helper.log_lines()),
            }
        }
        assert!(matches!(vm.helper.event(), VcpuEvent::GuestReset));
        for promised in [
            "Linux version",
            "Hypervisor detected: KVM",
            "ACPI: RSDP",
            "smp: Brought up 1 node, 2 CPUs",
            "ttyS0 at I/O 0x3f8",
            "VFS: Unable to mount root fs",
        ] {
            assert!(log.contains(promised), "no {promised:?} in: {log}");
        }
    }
}
