//! Request parsing against mock rings: legal requests in any layout, and arbitrary rubbish.

use super::chain::BrokenChain;
use super::request::{ByteRange, Command, Geometry, IO_ERROR, Request, UNSUPPORTED, parse};
use ipc::memory::GuestRam;
use proptest::prelude::*;
use std::cell::OnceCell;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const RAM: u64 = 0x4_0000;
const HEADER: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const GEOMETRY: Geometry = Geometry {
    capacity_sectors: 1000,
    block_sectors: 1,
    read_only: false,
};

thread_local! {
    static MEMORY: OnceCell<&'static GuestRam> = const { OnceCell::new() };
}

/// One RAM per thread: the mapping must live as long as the process.
fn memory() -> &'static GuestRam {
    MEMORY.with(|memory| {
        *memory.get_or_init(|| {
            Box::leak(Box::new(
                GuestRam::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap(),
            ))
        })
    })
}

fn parse_chain(descriptors: &[Descriptor], geometry: &Geometry) -> Result<Request, BrokenChain> {
    let memory = memory();
    memory.write_slice(&[0; 0x1000], GuestAddress(0)).unwrap();
    let queue = MockSplitQueue::new(memory, 16);
    let raw: Vec<RawDescriptor> = descriptors.iter().copied().map(RawDescriptor::from).collect();
    queue.add_desc_chains(&raw, 0).unwrap();
    let mut queue: Queue = queue.create_queue().unwrap();
    let chain = queue.iter(memory).unwrap().next().unwrap();
    parse(memory, chain, geometry)
}

fn write_header(kind: u32, sector: u64) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    memory().write_slice(&header, GuestAddress(HEADER)).unwrap();
}

/// Header, data and status as three descriptors.
fn request(kind: u32, sector: u64, data: u32, data_flags: u16, geometry: &Geometry) -> Request {
    write_header(kind, sector);
    let chain = [
        Descriptor::new(HEADER, 16, NEXT, 1),
        Descriptor::new(DATA, data, NEXT | data_flags, 2),
        Descriptor::new(HEADER + 16, 1, WRITE, 0),
    ];
    parse_chain(&chain, geometry).unwrap()
}

#[test]
fn sectors_are_checked_without_overflow() {
    let cases = [
        (0, 512, true),
        (999, 512, true),
        (999, 1024, false),
        (1000, 0, true),
        (1000, 512, false),
        (1001, 0, false),
        (u64::MAX, 512, false),
        (u64::MAX - 1, 1024, false),
        (u64::MAX / 512, 512, false),
        (0, 511, false),
        (0, 513, false),
    ];
    for (sector, bytes, good) in cases {
        let command = request(0, sector, bytes, WRITE, &GEOMETRY).command;
        match command {
            Command::Read { offset, into } if good => {
                assert_eq!((offset, into.bytes()), (sector * 512, u64::from(bytes)));
            }
            Command::Refuse(IO_ERROR) if !good => {}
            other => panic!("sector {sector}, {bytes} bytes: {other:?}"),
        }
    }
}

#[test]
fn large_blocks_must_be_whole() {
    let geometry = Geometry {
        block_sectors: 8,
        ..GEOMETRY
    };
    let refused = |sector, bytes| {
        matches!(
            request(1, sector, bytes, 0, &geometry).command,
            Command::Refuse(IO_ERROR)
        )
    };
    assert!(!refused(8, 4096));
    assert!(refused(4, 4096));
    assert!(refused(8, 512));
}

#[test]
fn ranges_are_read_once_and_checked_each() {
    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let ask = |kind, bytes: &[u8]| {
        memory().write_slice(bytes, GuestAddress(DATA)).unwrap();
        request(kind, 0, bytes.len() as u32, 0, &GEOMETRY).command
    };
    let two = [range(10, 5, 0), range(20, 1, 0)].concat();
    let Command::Discard(ranges) = ask(11, &two) else {
        panic!("refused")
    };
    let expected = [(10, 5), (20, 1)].map(|(sector, sectors)| ByteRange {
        offset: sector * 512,
        bytes: sectors * 512,
    });
    assert_eq!(ranges, expected);
    assert!(matches!(ask(11, &range(0, 1, 1)), Command::Refuse(UNSUPPORTED)));
    assert!(matches!(ask(13, &range(0, 1, 1)), Command::WriteZeroes(r) if r[0].may_unmap));
    assert!(matches!(ask(13, &range(0, 1, 3)), Command::Refuse(UNSUPPORTED)));
    assert!(matches!(ask(13, &range(999, 2, 0)), Command::Refuse(IO_ERROR)));
    assert!(matches!(ask(13, &two[..31]), Command::Refuse(IO_ERROR)));
    let many = range(0, 1, 0).repeat(17);
    assert!(matches!(ask(13, &many), Command::Refuse(IO_ERROR)));
}

#[test]
fn the_head_is_the_chains_name_and_the_status_its_last_byte() {
    write_header(4, 0);
    let chain = [
        Descriptor::new(HEADER, 16, NEXT, 1),
        Descriptor::new(DATA, 10, NEXT | WRITE, 2),
        Descriptor::new(DATA + 100, 0, WRITE, 0),
    ];
    let parsed = parse_chain(&chain, &GEOMETRY).unwrap();
    assert_eq!((parsed.head, parsed.status.0, parsed.writable_bytes), (0, DATA + 9, 9));
    assert!(matches!(parsed.command, Command::Flush));
}

/// Cuts `bytes` at `cuts` into descriptors.
fn cut(start: u64, bytes: u32, cuts: &[u32], flags: u16) -> Vec<(u64, u32, u16)> {
    let mut places: Vec<u32> = cuts.iter().map(|cut| cut % (bytes + 1)).collect();
    places.extend([0, bytes]);
    places.sort_unstable();
    places
        .windows(2)
        .map(|pair| (start + u64::from(pair[0]), pair[1] - pair[0], flags))
        .collect()
}

proptest! {
    #[test]
    fn any_layout_means_the_same(
        is_write: bool,
        sectors in 0u32..8,
        sector in 0u64..900,
        readable_cuts in prop::collection::vec(any::<u32>(), 0..6),
        writable_cuts in prop::collection::vec(any::<u32>(), 0..6),
    ) {
        // The readable part lies in one piece from HEADER, the writable part from DATA.
        write_header(u32::from(is_write), sector);
        let bytes = sectors * 512;
        let (readable, writable) = if is_write { (16 + bytes, 1) } else { (16, bytes + 1) };
        let mut pieces = cut(HEADER, readable, &readable_cuts, 0);
        pieces.extend(cut(DATA, writable, &writable_cuts, WRITE));
        let last = pieces.len() - 1;
        let chain: Vec<Descriptor> = pieces
            .iter()
            .enumerate()
            .map(|(i, &(address, bytes, flags))| {
                Descriptor::new(address, bytes, if i == last { flags } else { flags | NEXT }, i as u16 + 1)
            })
            .collect();
        let parsed = parse_chain(&chain, &GEOMETRY).unwrap();
        prop_assert_eq!(parsed.status.0, DATA + u64::from(writable) - 1);
        prop_assert_eq!(parsed.writable_bytes, writable - 1);
        match parsed.command {
            Command::Read { offset, into } => {
                prop_assert!(!is_write);
                prop_assert_eq!((offset, into.bytes()), (sector * 512, u64::from(bytes)));
            }
            Command::Write { offset, from } => {
                prop_assert!(is_write);
                prop_assert_eq!((offset, from.bytes()), (sector * 512, u64::from(bytes)));
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn rubbish_is_refused_or_harmless(
        descriptors in prop::collection::vec(
            (prop_oneof![0..RAM, Just(HEADER), Just(DATA), any::<u64>()],
             prop_oneof![0u32..0x1000, Just(16u32), Just(48u32), Just(1u32), any::<u32>()],
             prop_oneof![0u16..8, Just(NEXT), Just(NEXT | WRITE), Just(INDIRECT)],
             prop_oneof![0u16..16, any::<u16>()]),
            1..16),
        table in prop::collection::vec((0..RAM, 0u32..0x1000, 0u16..8, 0u16..4), 3),
        kind in prop_oneof![Just(0u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()],
        sector: u64,
        read_only: bool,
    ) {
        let memory = memory();
        write_header(kind, sector);
        // What an indirect descriptor may find.
        for (i, &(address, bytes, flags, next)) in table.iter().enumerate() {
            memory.write_obj(Descriptor::new(address, bytes, flags, next), GuestAddress(DATA + 16 * i as u64)).unwrap();
        }
        let chain: Vec<Descriptor> =
            descriptors.iter().map(|&(address, bytes, flags, next)| Descriptor::new(address, bytes, flags, next)).collect();
        let geometry = Geometry { read_only, ..GEOMETRY };
        let Ok(parsed) = parse_chain(&chain, &geometry) else { return Ok(()) };
        prop_assert!(parsed.status.0 < RAM);
        let start = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
        let check = |segments: &crate::buffer::Segments| segments.iovecs().iter().all(|iovec| {
            let at = iovec.iov_base as usize;
            at >= start && at + iovec.iov_len <= start + RAM as usize && iovec.iov_len > 0
        });
        let transfer = |offset: u64, segments: &crate::buffer::Segments| {
            check(segments) && offset.checked_add(segments.bytes()).is_some_and(|end| end <= 1000 * 512)
        };
        let inside = |range: &ByteRange| range.offset.checked_add(range.bytes).is_some_and(|end| end <= 1000 * 512);
        match &parsed.command {
            Command::Read { offset, into } => prop_assert!(transfer(*offset, into)),
            Command::Write { offset, from } => prop_assert!(!read_only && transfer(*offset, from)),
            Command::GetId { into } => prop_assert!(check(into)),
            Command::Discard(ranges) => prop_assert!(!read_only && ranges.iter().all(inside)),
            Command::WriteZeroes(ranges) => prop_assert!(!read_only && ranges.iter().all(|zero| inside(&zero.range))),
            Command::Flush | Command::Refuse(_) => {}
        }
    }
}
