//! Any bytes of a peer, to either end: it ends, without a panic, a hang or growth. The fuzz targets `nbd_client` and
//! `nbd_server` do the same for longer.

mod nbd_common;
use nbd_common::{attack_client, attack_server};
use proptest::prelude::*;

fn be(number: u64, bytes: usize) -> Vec<u8> {
    number.to_be_bytes()[8 - bytes..].to_vec()
}

/// A number that means something, or does not.
fn number(bytes: usize) -> impl Strategy<Value = Vec<u8>> {
    let interesting = prop_oneof![
        0_u64..32,
        Just(512),
        Just(4096),
        Just(1 << 20),
        Just(u64::MAX),
        any::<u64>()
    ];
    interesting.prop_map(move |number| be(number, bytes))
}

fn junk() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..60)
}

fn joined(parts: Vec<Vec<u8>>) -> Vec<u8> {
    parts.concat()
}

fn from_client() -> impl Strategy<Value = Vec<u8>> {
    let option = (0_u64..12, junk())
        .prop_map(|(kind, data)| joined(vec![b"IHAVEOPT".to_vec(), be(kind, 4), be(data.len() as u64, 4), data]));
    let query = joined(vec![
        be(1, 4),
        b"x".to_vec(),
        be(1, 4),
        be(15, 4),
        b"base:allocation".to_vec(),
    ]);
    let fixed = |kind, data: Vec<u8>| joined(vec![b"IHAVEOPT".to_vec(), be(kind, 4), be(data.len() as u64, 4), data]);
    let request = (0_u64..32, 0_u64..10, number(8), number(4)).prop_map(|(flags, command, offset, length)| {
        joined(vec![
            be(0x2560_9513, 4),
            be(flags, 2),
            be(command, 2),
            be(1, 8),
            offset,
            length,
        ])
    });
    prop_oneof![
        2 => option,
        1 => Just(fixed(8, Vec::new())),
        1 => Just(fixed(10, query)),
        2 => Just(fixed(7, joined(vec![be(1, 4), b"x".to_vec(), be(1, 2), be(3, 2)]))),
        1 => Just(fixed(1, b"x".to_vec())),
        6 => request,
        1 => junk(),
    ]
}

fn from_server() -> impl Strategy<Value = Vec<u8>> {
    let simple =
        (0_u64..40, 0_u64..9).prop_map(|(error, cookie)| joined(vec![be(0x6744_6698, 4), be(error, 4), be(cookie, 8)]));
    let kind = prop_oneof![0_u64..7, 0x8000_u64..0x8004, any::<u64>()];
    let chunk = (0_u64..3, kind, 0_u64..9, number(8), number(4), junk()).prop_map(
        |(flags, kind, cookie, offset, length, data)| {
            let payload = joined(vec![offset, length, data]);
            joined(vec![
                be(0x668e_33ef, 4),
                be(flags, 2),
                be(kind, 2),
                be(cookie, 8),
                be(payload.len() as u64, 4),
                payload,
            ])
        },
    );
    prop_oneof![3 => simple, 6 => chunk, 1 => junk()]
}

fn option_reply(option: u64, kind: u64, data: &[u8]) -> Vec<u8> {
    let magic = 0x0003_e889_0455_65a9;
    joined(vec![
        be(magic, 8),
        be(option, 4),
        be(kind, 4),
        be(data.len() as u64, 4),
        data.to_vec(),
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_server_survives_any_client(parts in prop::collection::vec(from_client(), 0..12), step in 1_usize..5000) {
        attack_server(&joined([vec![vec![0, 0, 0, 3]], parts].concat()), step);
    }

    #[test]
    fn a_client_survives_any_server(
        structured: bool, context: bool, bytes in number(8), flags in number(2), block in number(4),
        parts in prop::collection::vec(from_server(), 0..12), step in 1_usize..5000,
    ) {
        let mut said = vec![b"NBDMAGICIHAVEOPT\x00\x03".to_vec()];
        said.push(option_reply(8, if structured { 1 } else { 0x8000_0001 }, &[]));
        if structured {
            if context {
                said.push(option_reply(10, 4, &joined(vec![be(1, 4), b"base:allocation".to_vec()])));
            }
            said.push(option_reply(10, 1, &[]));
        }
        said.push(option_reply(7, 3, &joined(vec![be(3, 2), block, be(4096, 4), be(1 << 20, 4)])));
        said.push(option_reply(7, 3, &joined(vec![be(0, 2), bytes, flags])));
        said.push(option_reply(7, 1, &[]));
        attack_client(&joined([said, parts].concat()), step);
    }

    #[test]
    fn bytes_that_mean_nothing_end_at_once(bytes in prop::collection::vec(any::<u8>(), 0..300), step in 1_usize..50) {
        attack_server(&bytes, step);
        attack_client(&bytes, step);
    }
}
