//! Which copies begin when.

use super::copier::Scanned;
use super::outcome::RETRY;
use super::steps::{CHUNK_BESIDE_GUEST, COPIES_BESIDE_GUEST, SLICE, SLICES};
use super::*;
use crate::node::null::NullNode;
use ipc::block::IoKind;
use nix::errno::Errno;
use proptest::prelude::*;
use std::ops::Range;
use std::time::Duration;

const GRANULARITY: u64 = 4096;

fn job(kind: Kind, bytes: u64, chunk: u64) -> Job {
    let null = || Rc::new(NullNode::new(bytes, Duration::ZERO, true, Rc::default()));
    Job {
        number: JobNumber(1),
        kind,
        copier: Copier::new(null(), null(), everything(bytes, GRANULARITY)),
        filters: Filters {
            mirror: None,
            backup: None,
        },
        bitmap: None,
        users: Vec::new(),
        phase: Phase::Copy,
        cursor: 0,
        under_way: Vec::new(),
        paused: false,
        ready: false,
        speed: 0,
        next_at: Instant::now(),
        left_out: None,
        on_source_error: JobOnError::Ignore,
        on_target_error: JobOnError::Ignore,
        copied: 0,
        most_copies: 6,
        chunk,
        waiting: Vec::new(),
        events: Vec::new(),
        end: None,
    }
}

/// What may happen between two looks at what can begin.
#[derive(Debug, Clone)]
enum Happens {
    Ends(usize),
    Fails(usize),
    /// The guest writes: a granule, and how many.
    Write(u64, u64),
    Guest(bool),
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        4 => (0..8_usize).prop_map(Happens::Ends),
        1 => (0..8_usize).prop_map(Happens::Fails),
        2 => (0..200_u64, 1..20_u64).prop_map(|(at, count)| Happens::Write(at, count)),
        1 => any::<bool>().prop_map(Happens::Guest),
    ]
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

proptest! {
    #[test]
    fn no_two_copies_of_one_part_and_nothing_is_forgotten(
        granules in 1..200_u64,
        over in 0..8_u64,
        chunk in 1..40_u64,
        events in proptest::collection::vec(happens(), 0..120),
    ) {
        let bytes = granules * GRANULARITY + over * 512;
        let mut job = job(Kind::Mirror, bytes, chunk * GRANULARITY);
        let copier = job.copier.clone();
        let (mut now, mut beside_guest) = (Instant::now(), false);
        // Those under way that were written to since they began are left again when they end.
        let mut running: Vec<Range<u64>> = Vec::new();
        let mut events = events.into_iter();
        for _ in 0..2000 {
            let (steps, again) = job.next_steps(now, beside_guest);
            for step in steps {
                if step == Step::Flush {
                    prop_assert!(running.is_empty() && copier.left.borrow().is_clean() && !job.ready);
                    job.stepped(&step, Ok(None), now);
                    continue;
                }
                let Step::Copy(range) = step else { panic!("{step:?}") };
                prop_assert!(!running.iter().any(|other| overlap(other, &range)), "{range:?} beside {running:?}");
                prop_assert!(range.start < range.end && range.end <= bytes);
                prop_assert!(range.end - range.start <= (chunk * GRANULARITY).max(GRANULARITY));
                prop_assert!(range.start.is_multiple_of(GRANULARITY));
                prop_assert!(range.end.is_multiple_of(GRANULARITY) || range.end == bytes);
                let run = copier.left.borrow().next(range.start, u64::MAX);
                prop_assert!(run.is_some_and(|run| run.start == range.start && run.end >= range.end), "not all is left");
                copier.left.borrow_mut().clear(range.clone());
                running.push(range);
            }
            prop_assert!(running.len() <= 6);
            if running.is_empty() && again.is_none() && copier.left.borrow().is_clean() {
                prop_assert!(job.ready);
                if events.len() == 0 {
                    return Ok(());
                }
            }
            // When nothing else happens, what runs ends.
            match events.next().unwrap_or(Happens::Ends(0)) {
                Happens::Write(at, count) => {
                    copier.left.borrow_mut().set(at * GRANULARITY..(at + count) * GRANULARITY);
                }
                Happens::Guest(here) => beside_guest = here,
                Happens::Ends(which) if !running.is_empty() => {
                    let range = running.swap_remove(which % running.len());
                    job.stepped(&Step::Copy(range), Ok(None), now);
                }
                Happens::Fails(which) if !running.is_empty() => {
                    let range = running.swap_remove(which % running.len());
                    copier.left.borrow_mut().set(range.clone());
                    let error = CopyError { kind: IoKind::Write, errno: Errno::EIO };
                    job.stepped(&Step::Copy(range), Err(error), now);
                    let (none, again) = job.next_steps(now, beside_guest);
                    prop_assert!(none.is_empty() && again == Some(now + RETRY), "it is not tried again at once");
                    now += RETRY;
                }
                Happens::Ends(_) | Happens::Fails(_) => {}
            }
        }
        prop_assert!(false, "it does not come to an end");
    }
}

#[test]
fn a_limit_is_kept_whatever_the_size_of_copies() {
    for (speed, chunk) in [
        (64 << 10, 1 << 20),
        (10 << 20, 1 << 20),
        (3 << 30, 1 << 20),
        (1000, 4096),
    ] {
        let mut job = job(Kind::Mirror, 8 << 30, chunk);
        let start = Instant::now();
        job.set_speed(speed, start);
        let (mut now, mut bytes) = (start, 0);
        while now < start + Duration::from_secs(5) && bytes < 7 << 30 {
            let (steps, again) = job.next_steps(now, false);
            for step in steps {
                let Step::Copy(range) = &step else { panic!("{step:?}") };
                bytes += range.end - range.start;
                job.copier.left.borrow_mut().clear(range.clone());
                job.stepped(&step, Ok(None), now);
            }
            now = again.unwrap_or(now).max(now + Duration::from_micros(50));
        }
        let most = (now - start).as_secs_f64() * speed as f64;
        let slack = (speed / SLICES).max(GRANULARITY) as f64 + speed as f64 * SLICE.as_secs_f64();
        assert!(bytes as f64 <= most + slack, "{bytes} of {most} at {speed}");
        assert!(bytes as f64 >= most * 0.9 - slack, "{bytes} of {most} at {speed}");
    }
}

#[test]
fn beside_the_guest_copies_are_few_and_small() {
    let mut job = job(Kind::Once, 1 << 30, 1 << 20);
    let (steps, _) = job.next_steps(Instant::now(), true);
    assert_eq!(steps.len(), COPIES_BESIDE_GUEST);
    assert!(steps.iter().all(|step| step.bytes() <= CHUNK_BESIDE_GUEST));
    let (steps, _) = job.next_steps(Instant::now(), false);
    assert_eq!(steps.len(), 6 - COPIES_BESIDE_GUEST);
    assert!(steps.iter().all(|step| step.bytes() == 1 << 20));
}

#[test]
fn a_job_that_only_filters_begins_nothing_and_one_that_has_all_flushes_and_ends() {
    let mut filters = job(Kind::FilterOnly, 1 << 20, 1 << 20);
    let now = filters.next_at;
    assert_eq!(filters.next_steps(now, false), (vec![], None));
    let mut once = job(Kind::Once, 1 << 20, 1 << 20);
    let now = now.max(once.next_at);
    once.copier.left.borrow_mut().clear(0..1 << 20);
    assert_eq!(once.next_steps(now, false).0, [Step::Flush]);
    assert_eq!(once.next_steps(now, false), (vec![], None));
    once.stepped(&Step::Flush, Ok(None), now);
    assert_eq!(once.events, [JobEvent::Ended(Ok(()))]);
    assert_eq!(once.next_steps(now, false), (vec![], None));
}

/// What a scan has found: everything up to there, or nothing.
fn found(from: u64, until: u64, is_data: bool) -> Stepped {
    let copied = is_data.then_some(from..until).into_iter().collect();
    Ok(Some(Scanned { until, copied }))
}

#[test]
fn what_a_scan_has_found_is_copied_while_it_goes_on() {
    let (half, bytes) = (10 * GRANULARITY, 20 * GRANULARITY);
    for kind in [Kind::Once, Kind::Mirror] {
        let mut job = job(kind, bytes, 4 * GRANULARITY);
        if kind == Kind::Mirror {
            job.copier.left.borrow_mut().clear(0..bytes);
        }
        job.phase = Phase::Scan(0);
        let now = Instant::now();
        assert_eq!(job.next_steps(now, false).0, [Step::Scan(0)]);
        // Not whole bits: the other half of the last is to be looked at yet.
        job.stepped(&Step::Scan(0), found(0, half + 512, true), now);
        let steps = job.next_steps(now, false).0;
        let copy = |from: u64, to: u64| Step::Copy(from * GRANULARITY..to * GRANULARITY);
        assert_eq!(
            steps,
            [Step::Scan(half + 512), copy(0, 4), copy(4, 8), copy(8, 10)],
            "{kind:?}"
        );
        assert!(job.next_steps(now, false).0.is_empty());
        job.stepped(&Step::Scan(half + 512), found(half + 512, bytes, false), now);
        assert_eq!(job.next_steps(now, false).0, [copy(10, 11)], "{kind:?}");
        for step in steps.into_iter().chain([copy(10, 11)]) {
            if let Step::Copy(range) = &step {
                job.copier.left.borrow_mut().clear(range.clone());
                job.stepped(&step, Ok(None), now);
            }
        }
        assert_eq!(job.next_steps(now, false).0, [Step::Flush], "{kind:?}");
    }
}

#[test]
fn a_limited_job_only_looks_first() {
    let mut job = job(Kind::Once, 20 * GRANULARITY, 4 * GRANULARITY);
    job.phase = Phase::Scan(0);
    job.speed = 1 << 30;
    let now = Instant::now();
    assert_eq!(job.next_steps(now, false).0, [Step::Scan(0)]);
    job.stepped(&Step::Scan(0), found(0, 8 * GRANULARITY, true), now);
    assert_eq!(job.next_steps(now, false).0, [Step::Scan(8 * GRANULARITY)]);
}

#[test]
fn a_copy_that_fails_ends_a_job_whatever_its_scan_finds() {
    let mut job = job(Kind::Once, 20 * GRANULARITY, 4 * GRANULARITY);
    job.phase = Phase::Scan(0);
    job.on_target_error = JobOnError::Report;
    let now = Instant::now();
    job.next_steps(now, false);
    job.stepped(&Step::Scan(0), found(0, 8 * GRANULARITY, true), now);
    let steps = job.next_steps(now, false).0;
    let error = CopyError {
        kind: IoKind::Write,
        errno: Errno::EIO,
    };
    job.stepped(&steps[1], Err(error), now);
    job.stepped(&steps[0], found(8 * GRANULARITY, 20 * GRANULARITY, true), now);
    job.stepped(&steps[2], Ok(None), now);
    assert!(job.next_steps(now, false).0.is_empty());
    let ends = job.events.iter().filter(|event| matches!(event, JobEvent::Ended(_)));
    assert_eq!(ends.count(), 1);
}
