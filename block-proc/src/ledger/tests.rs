use super::*;
use proptest::prelude::*;

fn memory() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 4096 + LEDGER_BYTES as usize)]).unwrap()
}

fn ledger(memory: &GuestRam) -> Arc<Ledger> {
    Ledger::new(memory.clone(), 4096 + LEDGER_BYTES).unwrap()
}

fn number(number: u64) -> Note {
    Note {
        offset: number,
        descriptor: !number,
        bitmap: number << 1,
    }
}

#[test]
fn what_is_not_committed_is_found_again_by_the_next_and_the_one_after_that() {
    let memory = memory();
    let (first, second) = (NodeId(0), NodeId(7));
    let process = ledger(&memory);
    let (one, other) = (process.account(first), process.account(second));
    (0..ENTRIES + 5).for_each(|count| one.note(number(count)));
    let mark = one.begin_commit();
    one.note(number(1000));
    other.note(number(2000));
    one.end_commit(mark, true);
    for more in 0..2 {
        let process = ledger(&memory);
        let (one, other) = (process.account(first), process.account(second));
        let expected: Vec<Note> = [number(1000)].into_iter().chain((0..more).map(number)).collect();
        assert_eq!(one.left(), expected);
        assert_eq!(other.left(), [number(2000)]);
        one.note(number(more));
    }
    let process = ledger(&memory);
    let one = process.account(first);
    one.end_commit(one.begin_commit(), false);
    assert_eq!(one.left().len(), 3);
    one.end_commit(one.begin_commit(), true);
    assert_eq!(one.left(), []);
    drop(process.account(second));
    assert_eq!(ledger(&memory).account(first).left(), []);
}

#[test]
fn a_full_ledger_says_so_until_a_commit_has_made_up_for_it() {
    let memory = memory();
    let process = ledger(&memory);
    let (one, other) = (process.account(NodeId(1)), process.account(NodeId(2)));
    (0..CHUNKS * ENTRIES).for_each(|count| one.note(number(count)));
    assert!(!one.is_incomplete());
    other.note(number(0));
    assert!(other.is_incomplete());
    let mark = other.begin_commit();
    assert!(other.is_incomplete(), "it is not there yet");
    other.end_commit(mark, false);
    assert!(other.is_incomplete());
    other.end_commit(other.begin_commit(), true);
    assert!(!other.is_incomplete());
    one.end_commit(one.begin_commit(), true);
    other.note(number(1));
    assert!(!other.is_incomplete());
    assert_eq!(other.left(), [number(1)]);
}

proptest! {
    #[test]
    fn a_hostile_ledger_harms_nobody(words in proptest::collection::vec((0..LEDGER_BYTES / 8, any::<u64>()), 0..200)) {
        let memory = memory();
        for (place, word) in words {
            memory.store(word, GuestAddress(4096 + place * 8), Ordering::Release).unwrap();
        }
        let process = ledger(&memory);
        let account = process.account(NodeId(0));
        prop_assert!(account.left().len() as u64 <= CHUNKS * ENTRIES);
        account.note(number(3));
        account.end_commit(account.begin_commit(), true);
    }
}
