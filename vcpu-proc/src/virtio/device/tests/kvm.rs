//! The same device on the real KVM: interrupts reach the local APIC of a vCPU, kicks leave the guest as signals.

use super::*;
use kvm_bindings::{kvm_lapic_state, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::time::Duration;
use vm_memory::MmapRegion;

/// Offset of the first interrupt request register in the APIC's page; one per 32 vectors, 16 bytes apart.
const IRR: usize = 0x200;
/// Offset of the spurious interrupt vector register, whose bit 8 switches the APIC on.
const SPURIOUS: usize = 0xf0;
/// Long enough for KVM's worker to inject what it should not.
const SETTLE: Duration = Duration::from_millis(50);

/// A VM with interrupt controllers and one vCPU; `None`, said aloud, where there is no KVM.
fn vm() -> Option<(Arc<VmFd>, VcpuFd)> {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("skipped: no /dev/kvm");
        return None;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut apic = vcpu.get_lapic().unwrap();
    put(&mut apic, SPURIOUS, 0x1ff);
    vcpu.set_lapic(&apic).unwrap();
    Some((vm, vcpu))
}

fn put(apic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in apic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *register = i8::from_le_bytes([byte]);
    }
}

/// Takes the vectors that wait in the APIC.
fn take_vectors(vcpu: &VcpuFd) -> Vec<usize> {
    let mut apic = vcpu.get_lapic().unwrap();
    let mut vectors = Vec::new();
    for vector in 0..256 {
        let byte = apic.regs[IRR + 16 * (vector / 32) + vector % 32 / 8];
        if byte >> (vector % 8) & 1 != 0 {
            vectors.push(vector);
        }
    }
    (0..8).for_each(|word| put(&mut apic, IRR + 16 * word, 0));
    vcpu.set_lapic(&apic).unwrap();
    vectors
}

/// KVM injects from the signalling thread when it can and from a worker otherwise.
fn wait_for_vectors(vcpu: &VcpuFd) -> Vec<usize> {
    for _ in 0..200 {
        let vectors = take_vectors(vcpu);
        if !vectors.is_empty() {
            return vectors;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Vec::new()
}

#[test]
fn kvm_delivers_what_is_unmasked_and_keeps_what_is_masked() {
    let Some((vm, vcpu)) = vm() else { return };
    let machine = Machine::new(&IrqManager::new(vm));
    let driver = Driver::start(&machine);
    assert_eq!(take_vectors(&vcpu), Vec::<usize>::new());

    machine.fds[1].1.write(1).unwrap();
    assert_eq!(wait_for_vectors(&vcpu), [0x42]);

    driver.mask(2, true);
    machine.fds[1].1.write(1).unwrap();
    std::thread::sleep(SETTLE);
    assert_eq!(take_vectors(&vcpu), Vec::<usize>::new());
    assert_eq!(machine.read(driver.msix_table + 0x1000, 8), 1 << 2);

    driver.mask(2, false);
    assert_eq!(wait_for_vectors(&vcpu), [0x42]);
    assert_eq!(machine.read(driver.msix_table + 0x1000, 8), 0);

    machine.device().configure(configuration(5)).unwrap();
    assert_eq!(wait_for_vectors(&vcpu), [0x40]);

    machine.root.lock().unwrap().reset();
    machine.fds[1].1.write(1).unwrap();
    std::thread::sleep(SETTLE);
    assert_eq!(take_vectors(&vcpu), Vec::<usize>::new());
}

#[test]
fn a_guests_kicks_of_any_size_become_signals_without_an_exit() {
    let Some((vm, mut vcpu)) = vm() else { return };
    let machine = Machine::new(&IrqManager::new(vm.clone()));
    let driver = Driver::start(&machine);
    let kick = u32::try_from(driver.kick_address(0)).unwrap();

    // mov edx, kick; mov [edx], ax; mov [edx + 4], al; out 0xf5, al
    let mut code = vec![0xba];
    code.extend(kick.to_le_bytes());
    code.extend([0x66, 0x89, 0x02, 0x88, 0x42, 0x04, 0xe6, 0xf5]);
    let _memory = run_at_zero(&vm, &vcpu, &code);
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0xf5, _) => {}
        exit => panic!("{exit:?} before the end of the code"),
    }
    assert_eq!(machine.fds[0].0.read().unwrap(), 1);
    assert_eq!(machine.fds[1].0.read().unwrap(), 1);
}

/// Gives the guest one page with `code` and points the vCPU at it, in 32-bit mode without paging.
fn run_at_zero(vm: &VmFd, vcpu: &VcpuFd, code: &[u8]) -> MmapRegion {
    let memory = MmapRegion::new(4096).unwrap();
    assert!(code.len() <= memory.size());
    // SAFETY: the region is mapped, long enough, and nobody else knows it yet.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), memory.as_ptr(), code.len()) };
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: memory.size() as u64,
        userspace_addr: memory.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the caller keeps the mapping until the vCPU has run.
    unsafe { vm.set_user_memory_region(region) }.unwrap();

    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cr0 |= 1;
    sregs.cs.base = 0;
    sregs.cs.selector = 8;
    sregs.cs.type_ = 11;
    sregs.ds.selector = 16;
    sregs.ds.type_ = 3;
    for segment in [&mut sregs.cs, &mut sregs.ds] {
        segment.limit = u32::MAX;
        segment.g = 1;
        segment.db = 1;
    }
    (sregs.es, sregs.ss, sregs.fs, sregs.gs) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = 0;
    regs.rflags = 2;
    vcpu.set_regs(&regs).unwrap();
    memory
}
