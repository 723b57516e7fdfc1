//! Not a test but a measurement: `cargo test --release -p block-proc --test iops -- --ignored --nocapture`.

mod common;
use common::*;
use std::time::{Duration, Instant};

const DISK: u64 = 64 << 20;

#[test]
#[ignore = "prints numbers; run it on a quiet machine"]
fn requests_per_second() {
    for engine in ENGINES {
        for (name, kind) in [("read", T_IN), ("write", T_OUT)] {
            for depth in [1, 32] {
                let file = image(DISK);
                std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; DISK as usize], 0).unwrap();
                let (vm, mut queue) = Vm::with_disk(engine, &file, info(DISK), F_FLUSH);
                let mut state = 1u64;
                let mut offer = |queue: &mut Queue, slot: u16| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let flags = if kind == T_IN { WRITE } else { 0 };
                    let data = Desc {
                        address: queue.data_at(slot),
                        bytes: 4096,
                        flags,
                    };
                    queue.prepare(slot, kind, (state >> 33) % (DISK / 4096) * 8, Some(data));
                };
                (0..depth).for_each(|slot| offer(&mut queue, slot));
                queue.publish();
                queue.kick();
                let busy_before = busy(&vm);
                let start = Instant::now();
                let mut done = 0u64;
                while start.elapsed() < Duration::from_secs(2) {
                    let (head, _) = queue.wait_used();
                    offer(&mut queue, head as u16 / 3);
                    done += 1;
                    while let Some((head, _)) = queue.next_used() {
                        offer(&mut queue, head as u16 / 3);
                        done += 1;
                    }
                    queue.publish();
                    queue.kick();
                }
                let rate = done as f64 / start.elapsed().as_secs_f64();
                let cost = (busy(&vm) - busy_before) as f64 / done as f64 / 1000.0;
                println!(
                    "{engine:?}, 4 KiB random {name}, queue depth {depth}: {rate:.0} requests/s, {cost:.2} µs of CPU each"
                );
            }
        }
    }
}

/// How long block-proc's threads have run, nanoseconds: what others do on the machine changes it little.
fn busy(vm: &Vm) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.helper.child.id())).unwrap();
    let run_time = |task: std::fs::DirEntry| {
        let line = std::fs::read_to_string(task.path().join("schedstat")).unwrap();
        line.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    tasks.map(|task| run_time(task.unwrap())).sum()
}
