//! Application processors: start them, let them work at once, interrupt each.

use crate::failure::{Outcome, ensure, equal};
use crate::script::Arguments;
use crate::{clock, cpu, lapic, println, smp, tables};
use core::sync::atomic::{AtomicU64, Ordering};

/// The vector for processor `n` is this plus `n`.
const FIRST_VECTOR: u8 = 0x80;
const INTERRUPTED_PROCESSORS: usize = 64;

static SUM: AtomicU64 = AtomicU64::new(0);
static WRONG_IDS: AtomicU64 = AtomicU64::new(0);

/// `cpus=N` (default: all listed), `rounds=N` increments by each.
pub fn run(arguments: Arguments<'_>) -> Outcome {
    let listed = smp::listed()?;
    let wanted = arguments.number("cpus", listed as u64)? as usize;
    let rounds = arguments.number("rounds", 200_000)?;
    equal("processors listed in the MADT", listed as u64, wanted as u64)?;
    smp::start(wanted)?;
    SUM.store(0, Ordering::SeqCst);
    let start = cpu::tsc();
    for processor in 1..wanted {
        smp::begin(processor, count, rounds);
    }
    count(0, rounds);
    smp::join(1..wanted, 120_000)?;
    let ns = clock::nanoseconds(cpu::tsc() - start);
    equal("increments", SUM.load(Ordering::SeqCst), rounds * wanted as u64)?;
    equal(
        "wrong interrupt controller numbers",
        WRONG_IDS.load(Ordering::SeqCst),
        0_u8,
    )?;
    for processor in 1..wanted.min(INTERRUPTED_PROCESSORS) {
        let vector = FIRST_VECTOR + processor as u8;
        let seen = tables::interrupts(vector);
        smp::begin(processor, await_interrupt, u64::from(vector));
        clock::pause_us(100);
        lapic::interrupt(smp::controller(processor), vector);
        smp::join(processor..processor + 1, 20_000)?;
        equal("interrupts of a processor", tables::interrupts(vector), seen + 1)?;
    }
    println!("smp cpus={wanted} sum={} ns={ns}", SUM.load(Ordering::SeqCst));
    ensure(wanted <= smp::MAX_PROCESSORS, "too many processors")
}

fn count(processor: usize, rounds: u64) {
    if lapic::id() != smp::controller(processor) {
        WRONG_IDS.fetch_add(1, Ordering::SeqCst);
    }
    for _ in 0..rounds {
        SUM.fetch_add(1, Ordering::Relaxed);
    }
}

fn await_interrupt(_processor: usize, vector: u64) {
    let vector = vector as u8;
    let seen = tables::interrupts(vector);
    lapic::wait(vector, seen, 10_000);
}
