use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;

const SIZE: u16 = 8;
const BYTES: u64 = 4096;

fn record() -> &'static Record {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
    let notes = GuestRam::from_ranges(&[(GuestAddress(0), BYTES as usize)]).unwrap();
    Box::leak(Box::new(Record::new(notes, &ram).unwrap()))
}

fn notes(record: &'static Record) -> Notes {
    Notes::new(record, Places::new(BYTES + LEDGER_BYTES).take(SIZE).unwrap(), SIZE)
}

const FIRST: ActivationNumber = ActivationNumber(1);

#[test]
fn what_was_taken_and_not_answered_is_found_in_its_order() {
    let record = record();
    let mut before = notes(record);
    assert!(before.begin(FIRST, 0).is_empty());
    for head in [3, 1, 7, 0] {
        before.taken(head);
    }
    before.answering(1, 0);
    before.answered(1);
    let mut after = notes(record);
    assert_eq!(after.begin(FIRST, 1), [3, 7, 0]);
    // What is taken later is later.
    after.taken(1);
    assert_eq!(notes(record).begin(FIRST, 1), [3, 7, 0, 1]);
}

#[test]
fn another_activation_begins_anew() {
    let record = record();
    let mut before = notes(record);
    before.begin(FIRST, 0);
    before.taken(2);
    before.answering(2, 0);
    assert!(notes(record).begin(ActivationNumber(2), 0).is_empty());
    assert!(notes(record).begin(ActivationNumber(2), 1).is_empty());
}

#[test]
fn an_answer_that_was_being_given_counts_if_the_used_index_moved() {
    for (used, expected) in [(5, vec![4]), (6, vec![])] {
        let record = record();
        let mut before = notes(record);
        before.begin(FIRST, 5);
        before.taken(4);
        before.answering(4, 5);
        assert_eq!(notes(record).begin(FIRST, used), expected);
        // Also when the next one dies at once.
        assert_eq!(notes(record).begin(FIRST, used), expected);
    }
}

#[test]
fn queues_have_places_of_their_own_and_no_more_than_there_are() {
    let bytes = ipc::inflight::total_bytes([(2, 256), (1, 1024)]);
    let mut places = Places::new(bytes);
    let first = places.take(256).unwrap();
    let second = places.take(256).unwrap();
    let third = places.take(1024).unwrap();
    assert_eq!((second - first, third - second), (16 + 256 * 8, 16 + 256 * 8));
    assert!(third + 16 + 1024 * 8 <= bytes - LEDGER_BYTES);
    assert!(places.take(1024).is_err());
}

#[test]
fn notes_of_another_version_are_refused() {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
    let notes = GuestRam::from_ranges(&[(GuestAddress(0), BYTES as usize)]).unwrap();
    notes.store(VERSION + 1, GuestAddress(0), Ordering::Release).unwrap();
    let refused = Record::new(notes, &ram).err().unwrap();
    assert!(refused.message.contains("version"), "{}", refused.message);
}

/// Where a block-proc may die.
#[derive(Debug, Clone, Copy)]
enum Step {
    Take,
    /// Answers one of those under way.
    Answer(usize),
    /// Dies so many steps into an answer: before the used index moves, after it, after the request is struck out.
    DieAnswering(usize, u8),
    /// Dies after it has read the avail ring and before it has noted what it took.
    DieTaking,
    Die,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Take),
        4 => any::<usize>().prop_map(Step::Answer),
        1 => (any::<usize>(), 0..3u8).prop_map(|(which, at)| Step::DieAnswering(which, at)),
        1 => Just(Step::DieTaking),
        1 => Just(Step::Die),
    ];
    proptest::collection::vec(step, 0..200)
}

proptest! {
    /// A driver and a block-proc that dies anywhere: every request is answered once, and those that are done again come in
    /// the order in which they were taken.
    #[test]
    fn no_request_is_lost_or_answered_twice(steps in steps()) {
        let record = record();
        let mut notes = notes(record);
        prop_assert!(notes.begin(FIRST, 0).is_empty());
        // The driver: free heads, what it has made available and nobody has taken; the used index.
        let mut free: VecDeque<u16> = (0..SIZE).collect();
        let mut available: VecDeque<u16> = VecDeque::new();
        let mut used = 0u16;
        let mut under_way: Vec<u16> = Vec::new();
        for step in steps {
            while let Some(head) = free.pop_front() {
                available.push_back(head);
            }
            let died = match step {
                Step::Take => {
                    if let Some(head) = available.pop_front() {
                        notes.taken(head);
                        under_way.push(head);
                    }
                    false
                }
                Step::Answer(which) | Step::DieAnswering(which, _) if !under_way.is_empty() => {
                    let dies_at = match step {
                        Step::DieAnswering(_, at) => at,
                        _ => u8::MAX,
                    };
                    let place = which % under_way.len();
                    let head = under_way[place];
                    notes.answering(head, used);
                    if dies_at > 0 {
                        used = used.wrapping_add(1);
                        under_way.remove(place);
                        free.push_back(head);
                        if dies_at > 1 {
                            notes.set(head, 0);
                        }
                        if dies_at > 2 {
                            notes.answered(head);
                        }
                    }
                    dies_at <= 2
                }
                Step::Answer(_) | Step::DieAnswering(..) => false,
                Step::DieTaking | Step::Die => true,
            };
            if died {
                notes = self::notes(record);
                let found = notes.begin(FIRST, used);
                prop_assert_eq!(&found, &under_way);
            }
        }
    }

    /// A record of a hostile block-proc may say anything.
    #[test]
    fn any_record_is_read(words in proptest::collection::vec(any::<u64>(), 10), used: u16) {
        let record = record();
        for (place, word) in (0..).zip(&words) {
            record.notes.store(*word, GuestAddress(HEADER_BYTES + 8 * place), Ordering::Release).unwrap();
        }
        let mut notes = notes(record);
        let found = notes.begin(ActivationNumber(words[0]), used);
        prop_assert!(found.len() <= usize::from(SIZE));
        prop_assert!(found.iter().all(|head| *head < SIZE));
        notes.taken(0);
        notes.answering(0, used);
        notes.answered(0);
    }
}
