//! Application processors: starting them and giving them work.

use crate::failure::{Failure, ensure};
use crate::region::Region;
use crate::{acpi, clock, cpu, lapic, tables};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Most processors, the boot processor included.
pub const MAX_PROCESSORS: usize = 256;
/// Where the start-up code goes: a page below 1 MiB.
const TRAMPOLINE: u32 = 0x8000;

/// Work for one processor.
pub type Work = fn(processor: usize, argument: u64);

struct Processor {
    controller: AtomicU32,
    running: AtomicBool,
    work: AtomicUsize,
    argument: AtomicU64,
    /// Its stacks exist: a processor is only started once between resets.
    prepared: AtomicBool,
}

static PROCESSORS: [Processor; MAX_PROCESSORS] = [const {
    Processor {
        controller: AtomicU32::new(0),
        running: AtomicBool::new(false),
        work: AtomicUsize::new(0),
        argument: AtomicU64::new(0),
        prepared: AtomicBool::new(false),
    }
}; MAX_PROCESSORS];

/// Number of the processor's interrupt controller.
pub fn controller(processor: usize) -> u32 {
    PROCESSORS[processor].controller.load(Ordering::SeqCst)
}

/// How many processors the ACPI tables list.
pub fn listed() -> Result<usize, Failure> {
    let mut count = 0;
    acpi::root()?.processors(|_| count += 1)?;
    Ok(count)
}

/// Starts processors until `wanted` run, this one included.
pub fn start(wanted: usize) -> Result<(), Failure> {
    let boot = lapic::id();
    PROCESSORS[0].controller.store(boot, Ordering::SeqCst);
    PROCESSORS[0].running.store(true, Ordering::SeqCst);
    let code = tables::trampoline();
    Region::new(u64::from(TRAMPOLINE), 4096).copy_from(code);
    let mut index = 1;
    acpi::root()?.processors(|id| {
        if id != boot && index < MAX_PROCESSORS {
            PROCESSORS[index].controller.store(id, Ordering::SeqCst);
            index += 1;
        }
    })?;
    ensure(wanted <= index, "fewer processors listed than wanted")?;
    for (number, processor) in PROCESSORS.iter().enumerate().take(wanted).skip(1) {
        if processor.prepared.swap(true, Ordering::SeqCst) {
            continue;
        }
        tables::prepare_processor(number as u64);
        lapic::start(processor.controller.load(Ordering::SeqCst), TRAMPOLINE);
        let deadline = clock::Deadline::after_ms(10_000);
        while !processor.running.load(Ordering::SeqCst) {
            ensure(!deadline.passed(), "a processor does not start")?;
            core::hint::spin_loop();
        }
    }
    Ok(())
}

/// Gives a running processor something to do.
pub fn begin(processor: usize, work: Work, argument: u64) {
    let target = &PROCESSORS[processor];
    assert!(processor != 0 && target.running.load(Ordering::SeqCst));
    target.argument.store(argument, Ordering::SeqCst);
    target.work.store(work as usize, Ordering::SeqCst);
    lapic::interrupt(target.controller.load(Ordering::SeqCst), lapic::WAKE_VECTOR);
}

/// Whether it has done what it was given.
pub fn idle(processor: usize) -> bool {
    PROCESSORS[processor].work.load(Ordering::SeqCst) == 0
}

/// Waits until all of these processors are idle.
pub fn join(processors: core::ops::Range<usize>, timeout_ms: u64) -> Result<(), Failure> {
    let deadline = clock::Deadline::after_ms(timeout_ms);
    for processor in processors {
        while !idle(processor) {
            ensure(!deadline.passed(), "a processor does not finish its work")?;
            core::hint::spin_loop();
        }
    }
    Ok(())
}

/// Where application processors arrive in ring 3.
#[unsafe(no_mangle)]
extern "C" fn application_processor_start(index: usize) -> ! {
    lapic::init();
    let own = &PROCESSORS[index];
    own.running.store(true, Ordering::SeqCst);
    loop {
        let work = own.work.load(Ordering::SeqCst);
        if work == 0 {
            cpu::wait_for_interrupt();
            continue;
        }
        // SAFETY: only `begin` stores a value that is not 0, and it is such a function.
        let work: Work = unsafe { core::mem::transmute::<usize, Work>(work) };
        work(index, own.argument.load(Ordering::SeqCst));
        own.work.store(0, Ordering::SeqCst);
    }
}
