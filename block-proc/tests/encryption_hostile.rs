//! Encryption headers that somebody made to do harm: clear errors, bounded memory, bounded time.

mod encryption_common;
mod qcow2_common;

use block_proc::crypto::CryptoError;
use block_proc::crypto::cipher::Spec;
use block_proc::crypto::hash::Hash;
use block_proc::crypto::luks::header::{HEADER_BYTES, Header};
use block_proc::crypto::luks::{CreateOptions, Iterations, MAX_ITERATIONS};
use block_proc::crypto::random::Random as Csprng;
use block_proc::node::Node;
use block_proc::node::luks::{OpenError, format};
use block_proc::node::qcow2::{self, Fault};
use encryption_common::*;
use ipc::secret::Seed;
use nix::errno::Errno;
use qcow2_common::*;
use std::sync::OnceLock;

const SLOT_0: usize = 208;
const SLOT_1: usize = SLOT_0 + 48;

/// A volume of 64 KiB that opens at once.
fn volume() -> Vec<u8> {
    static VOLUME: OnceLock<Vec<u8>> = OnceLock::new();
    let make = || {
        let child = Memory::new(Vec::new(), 1);
        let same = child.clone();
        let payload = block_on(async move {
            let options = CreateOptions {
                spec: Spec::of_qemu(Some("aes-128"), None, None, None).unwrap(),
                hash: Hash::Sha256,
                iterations: Iterations::Count(1000),
            };
            let mut random = Csprng::from_seed(&Seed::new([1; 32]));
            let key = secret(PASSWORD).unwrap();
            format(&*same, &options, 1, &key, &mut random).await.unwrap()
        });
        let mut bytes = child.bytes.borrow().clone();
        bytes.resize(payload as usize + (64 << 10), 0);
        bytes
    };
    VOLUME.get_or_init(make).clone()
}

fn put(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn error(image: Vec<u8>) -> OpenError {
    open_luks(&Memory::new(image, 1), PASSWORD).map(drop).unwrap_err()
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    assert!(open_luks(&Memory::new(volume(), 1), PASSWORD).is_ok());
    let file_sectors = (volume().len() / 512) as u32;
    let changed: [(&str, usize, u32); 22] = [
        ("version 2", 4, 0xbabe_0002),
        ("cipher \"Zes\"", 8, u32::from_be_bytes(*b"Zes\0")),
        ("cipher \"\"", 8, 0),
        ("cipher mode", 40, u32::from_be_bytes(*b"xyz-")),
        ("the hash has no name", 72, 0xffff_ffff),
        ("payload", 104, 0),
        ("payload", 104, 1),
        ("payload", 104, file_sectors + 1),
        ("payload", 104, u32::MAX),
        ("no key of 0 bytes", 108, 0),
        ("no key of 4294967295 bytes", 108, u32::MAX),
        ("digest has no iterations", 164, 0),
        ("digest of the LUKS header asks for 4294967295", 164, u32::MAX),
        ("key slot 0 has the state 0x1", SLOT_0, 1),
        ("key slot 0 has no iterations", SLOT_0 + 4, 0),
        (
            "key slot 0 of the LUKS header asks for 67108865",
            SLOT_0 + 4,
            MAX_ITERATIONS + 1,
        ),
        ("lies on the header", SLOT_0 + 40, 0),
        ("lies on the header", SLOT_0 + 40, 1),
        ("lies on the payload", SLOT_0 + 40, u32::MAX),
        ("key slot 0 has 0 stripes", SLOT_0 + 44, 0),
        ("key slot 0 has 3999 stripes", SLOT_0 + 44, 3999),
        ("key slot 0 has 4294967295 stripes", SLOT_0 + 44, u32::MAX),
    ];
    for (what, at, value) in changed {
        let mut image = volume();
        put(&mut image, at, value);
        let said = error(image).to_string();
        assert!(said.contains(what), "{what} at {at}: {said}");
    }
    // Two slots with the same key material.
    let mut image = volume();
    let slot: Vec<u8> = image[SLOT_0..SLOT_1].to_vec();
    image[SLOT_1..SLOT_1 + 48].copy_from_slice(&slot);
    assert!(error(image).to_string().contains("lies on another slot's"));
    // Key material behind the file's end: the payload would be there, too.
    let mut image = volume();
    image.truncate(SLOT_0 * 512);
    assert!(matches!(error(image), OpenError::Crypto(CryptoError::Invalid(_))));
    assert_eq!(error(Vec::new()), CryptoError::NotLuks.into());
    assert_eq!(error(vec![0; 4096]), CryptoError::NotLuks.into());
    assert!(
        error(volume()[..100].to_vec())
            .to_string()
            .contains("no key of 0 bytes")
    );
}

#[test]
fn a_volume_without_a_key_in_use_opens_with_none() {
    let mut image = volume();
    put(&mut image, SLOT_0, 0xdead);
    assert_eq!(error(image), CryptoError::WrongKey.into());
}

/// Unused slots are noise: nothing of them is looked at.
#[test]
fn what_unused_slots_hold_does_not_matter() {
    let mut image = volume();
    for slot in 1..8 {
        let at = SLOT_0 + slot * 48;
        image[at + 4..at + 48].fill(0xff);
    }
    assert!(open_luks(&Memory::new(image, 1), PASSWORD).is_ok());
}

#[test]
fn damaged_key_material_opens_with_no_password() {
    let header = Header::parse(&volume()[..HEADER_BYTES], volume().len() as u64).unwrap();
    let material = header.material(&header.slots[0]);
    for at in [material.start, (material.start + material.end) / 2, material.end - 1] {
        let mut image = volume();
        image[at as usize] ^= 1;
        assert_eq!(error(image), CryptoError::WrongKey.into(), "{at}");
    }
}

/// Random bytes changed in the header: whatever happens, it ends soon.
#[test]
fn damaged_at_random() {
    let mut parsed = 0;
    for seed in 0..20_000_u64 {
        let mut random = Random::new(seed);
        let mut image = volume()[..HEADER_BYTES].to_vec();
        for _ in 0..random.below(4) + 1 {
            let at = random.below(HEADER_BYTES as u64) as usize;
            image[at] = match random.below(3) {
                0 => random.next() as u8,
                1 => image[at] ^ (1 << random.below(8)),
                _ => [0, 1, 0x7f, 0xff][random.below(4) as usize],
            };
        }
        let bytes = volume().len() as u64;
        if let Ok(header) = Header::parse(&image, bytes) {
            parsed += 1;
            assert!(header.payload_offset <= bytes);
            for slot in header.slots.iter().filter(|slot| slot.is_active) {
                assert!(header.material(slot).end <= header.payload_offset && slot.iterations <= MAX_ITERATIONS);
            }
            // What it says is what it would write, but for what it has no use for.
            assert_eq!(Header::parse(&header.encode(), bytes).as_ref(), Ok(&header));
        }
    }
    assert!(parsed > 1000, "only {parsed} headers were worth the test");
}

/// A qcow2 image with a LUKS header, and where the header extension for it is.
fn qcow2_image() -> (Vec<u8>, usize) {
    let folder = tempfile::tempdir().unwrap();
    let options = "encrypt.format=luks,encrypt.iter-time=10,cluster_size=4k";
    let image = encrypted(folder.path(), "qcow2", options, &[7; 64 << 10]);
    let at = image
        .windows(8)
        .position(|bytes| bytes == [0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16])
        .expect("an extension");
    (image, at)
}

#[test]
fn encryption_of_qcow2_images_that_cannot_be() {
    let (image, extension) = qcow2_image();
    assert!(open_encrypted(&Memory::new(image.clone(), 1), PASSWORD, None).is_ok());
    let with = |at: usize, bytes: &[u8]| {
        let mut image = image.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        let opened = open_encrypted(&Memory::new(image, 1), PASSWORD, None);
        opened.map(drop).unwrap_err()
    };
    let l1 = &image[40..48];
    for (what, at, bytes) in [
        ("encryption method 3", 35, &[3][..]),
        ("there is no place for the LUKS header", extension, &[1]),
        ("there is no place for the LUKS header", extension + 7, &[8]),
        ("is not on a cluster", extension + 8, &[0xff]),
        ("is not on a cluster", extension + 15, &[1]),
        ("is not on a cluster", extension + 8, &[0; 8]),
        ("is not on a cluster", extension + 16, &[0xff]),
        ("is not on a cluster", extension + 20, &[0x7f]),
        // The L1 table is no LUKS header.
        ("Volume is not in LUKS format", extension + 8, l1),
        // Shorter than what is in it.
        ("lies on the payload", extension + 16, &[0, 0, 0, 0, 0, 0, 16, 0]),
    ] {
        let said = with(at, bytes).to_string();
        let is_other = what == "lies on the payload" && said.contains("is not in the file");
        assert!(said.contains(what) || is_other, "{what}: {said}");
    }
    // On the refcount table's cluster there is no LUKS header; with one there, it is used twice.
    let mut twice = image.clone();
    let offset = u64::from_be_bytes(image[extension + 8..extension + 16].try_into().unwrap());
    let table = u64::from_be_bytes(image[40..48].try_into().unwrap()) as usize;
    twice[table..table + 8].copy_from_slice(&(offset | 1 << 63).to_be_bytes());
    let error = open_encrypted(&Memory::new(twice, 1), PASSWORD, None).map(drop);
    assert!(
        matches!(error, Err(qcow2::OpenError::Damaged(Fault::Overlap { .. }))),
        "{error:?}"
    );
}

/// Data on the LUKS header would make the image unreadable for ever.
#[test]
fn guests_cannot_write_on_the_header() {
    let (mut image, extension) = qcow2_image();
    let offset = u64::from_be_bytes(image[extension + 8..extension + 16].try_into().unwrap());
    let l1 = u64::from_be_bytes(image[40..48].try_into().unwrap()) as usize;
    let l2 = (u64::from_be_bytes(image[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize;
    image[l2..l2 + 8].copy_from_slice(&(offset | 1 << 63).to_be_bytes());
    let child = Memory::new(image, 1);
    let node = open_encrypted(&child, PASSWORD, None).unwrap();
    block_on(async move {
        assert_eq!(node.write(0, segments(&[1; 4096]), false).await, Err(Errno::EIO));
    });
    let header = child.bytes.borrow()[offset as usize..][..6].to_vec();
    assert_eq!(header, b"LUKS\xba\xbe");
}

/// What is compressed was never encrypted: an image that mixes both was put together by somebody else.
#[test]
fn compressed_clusters_are_refused_in_encrypted_images() {
    let (mut image, _) = qcow2_image();
    let l1 = u64::from_be_bytes(image[40..48].try_into().unwrap()) as usize;
    let l2 = (u64::from_be_bytes(image[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize;
    let entry = u64::from_be_bytes(image[l2..l2 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    image[l2..l2 + 8].copy_from_slice(&(entry | 1 << 62).to_be_bytes());
    let child = Memory::new(image, 1);
    let node = open_encrypted(&child, PASSWORD, None).unwrap();
    block_on(async move {
        assert_eq!(read(&*node, 0, 512).await, Err(Errno::EIO));
        assert_eq!(read(&*node, 4096, 512).await.unwrap(), [7; 512]);
    });
    assert_eq!(child.bytes.borrow()[79] & 2, 0, "the image is not marked as corrupt");
}

/// The most work that a header can ask for, of which others notice nothing.
#[test]
fn a_header_that_asks_for_much_work_holds_nobody_up() {
    use block_proc::executor::Executor;
    let mut image = volume();
    put(&mut image, SLOT_0 + 4, MAX_ITERATIONS);
    let child = Memory::new(image, 1);
    let mut executor = Executor::<u32>::default();
    let (gate, same) = (child.clone(), child.clone());
    executor.spawn(async move {
        // Ends with an error as soon as the file is gone.
        let opened = block_proc::node::luks::LuksNode::open(gate.clone(), luks_options(&gate, PASSWORD)).await;
        u32::from(opened.is_err())
    });
    executor.spawn(async move {
        for _ in 0..20 {
            read(&*same, 0, 512).await.unwrap();
        }
        same.fail_reads.set(true);
        2
    });
    let start = std::time::Instant::now();
    let mut finished = Vec::new();
    executor.run(&mut finished);
    finished.sort_unstable();
    assert_eq!(finished, [1, 2]);
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}
