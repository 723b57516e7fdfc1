//! A freestanding guest that tests a virtual machine monitor from inside, and measures it.
//!
//! It boots by PVH or as Bulkhead's flat image, takes its orders from the kernel command line, drives PCI and
//! virtio-blk, and reports over the serial port in lines that start with `BHG:`. [`script`] lists the orders.
//!
//! All Rust code runs in ring 3, with I/O privilege and the whole address space mapped one to one: there are KVM hosts
//! without hardware virtualisation that interpret ring 0 slowly and run ring 3 natively. Ring 0 is `boot.s` alone:
//! entry, interrupt counters, and the wait for an interrupt, which faults in ring 3 and is executed there.
//!
//! Unsafe code lives in [`region`] (physical memory), [`cpu`] (instructions), [`tables`] (descriptor and page tables),
//! [`smp`] and [`spin`] (sharing between processors) and [`freestanding`]. Physical memory outside of the image is only reached through [`region::Region`], never by
//! reference, so that no device can break a Rust object.

#![no_std]
#![no_main]

mod acpi;
mod alloc;
mod blk;
mod cases;
mod clock;
mod cpu;
mod failure;
mod freestanding;
mod histogram;
mod lapic;
mod pattern;
mod pci;
mod power;
mod queue;
mod region;
mod script;
mod serial;
mod smp;
mod spin;
mod start_info;
mod tables;
mod virtio;
mod virtio_mmio;
mod virtio_pci;

core::arch::global_asm!(include_str!("boot.s"));

/// Where the boot processor arrives in ring 3.
#[unsafe(no_mangle)]
extern "C" fn boot_processor_start(start_info: u64) -> ! {
    serial::init();
    tables::fill_idt();
    start_info::init(start_info);
    alloc::init();
    lapic::init();
    script::run();
    power::off()
}
