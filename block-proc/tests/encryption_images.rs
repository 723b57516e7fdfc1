//! Encrypted images: QEMU's tools, cryptsetup and we read what the others wrote.

mod encryption_common;
mod qcow2_common;

use block_proc::crypto::CryptoError;
use block_proc::crypto::cipher::Spec;
use block_proc::crypto::hash::Hash;
use block_proc::crypto::luks::{CreateOptions, Iterations};
use block_proc::crypto::random::Random as Csprng;
use block_proc::node::Node;
use block_proc::node::luks::{self, format, read_header};
use block_proc::node::qcow2::crypt::read_luks_header;
use block_proc::node::qcow2::encrypt::{NewEncryption, encrypt};
use block_proc::node::qcow2::header::Encryption;
use block_proc::node::qcow2::{Children, OpenError, Options, read_header as read_qcow2_header};
use encryption_common::*;
use ipc::secret::Seed;
use nix::errno::Errno;
use qcow2_common::*;
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

const SIZE: usize = 1 << 20;

/// Data, holes, and a last cluster that is cut short.
fn model() -> Vec<u8> {
    let mut data = random_bytes(SIZE, 7);
    data[200 << 10..600 << 10].fill(0);
    data.truncate(SIZE - 1536);
    data
}

/// Images by qemu-img alone, which measures PBKDF2 for a second or two for each LUKS header.
const BY_QEMU: [(&str, &str); 7] = [
    ("luks", "iter-time=10"),
    (
        "luks",
        "iter-time=10,cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1",
    ),
    ("qcow2", "encrypt.format=luks,encrypt.iter-time=10"),
    (
        "qcow2",
        "encrypt.format=luks,encrypt.iter-time=10,cluster_size=512,encrypt.cipher-alg=aes-128",
    ),
    ("qcow2", "encrypt.format=aes"),
    ("qcow2", "encrypt.format=aes,compat=0.10,cluster_size=4k"),
    ("qcow2", "encrypt.format=aes,extended_l2=on"),
];

/// Headers by cryptsetup, data by qemu-img: cipher, bits of the key, hash.
const BY_CRYPTSETUP: [(&str, &str, &str); 8] = [
    ("aes-xts-plain64", "512", "sha256"),
    ("aes-xts-plain64", "256", "ripemd160"),
    ("aes-xts-plain", "512", "sha1"),
    ("aes-cbc-essiv:sha256", "256", "sha512"),
    ("aes-cbc-essiv:sha256", "128", "sha224"),
    ("aes-cbc-plain64", "128", "sha384"),
    ("aes-cbc-plain64", "256", "sha256"),
    ("aes-cbc-plain", "256", "sha256"),
];

#[test]
fn images_that_qemu_encrypted_read_back_and_what_we_write_reads_back_there() {
    let folder = tempfile::tempdir().unwrap();
    for (format, options) in BY_QEMU {
        let model = model();
        let image = encrypted(folder.path(), format, options, &model);
        reads_and_writes(folder.path(), format, image, model, options);
    }
}

#[test]
fn volumes_that_cryptsetup_made_read_back_and_what_we_write_reads_back_in_qemu() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, image) = (folder.path().join("plain"), folder.path().join("volume"));
    for (cipher, bits, hash) in BY_CRYPTSETUP {
        let model = model();
        std::fs::write(&plain, &model).unwrap();
        std::fs::write(&image, vec![0; PAYLOAD_BY_CRYPTSETUP + model.len()]).unwrap();
        luks_format(&image, cipher, bits, hash, PASSWORD);
        let (from, to) = (described("raw", &plain), described("luks", &image));
        qemu_img_encrypted(&["convert", "-n", "--image-opts", "--target-image-opts", &from, &to]);
        let image = std::fs::read(&image).unwrap();
        reads_and_writes(folder.path(), "luks", image, model, cipher);
    }
}

fn reads_and_writes(folder: &Path, format: &str, image: Vec<u8>, mut model: Vec<u8>, what: &str) {
    let child = Memory::new(image, 1);
    let (node, bytes) = open_any(&child, format, None);
    let now = all(&node, bytes);
    let differs = now.iter().zip(&model).position(|(now, then)| now != then);
    assert_eq!((differs, now.len()), (None, model.len()), "{format} {what}");
    let mut random = Random::new(3);
    for round in 0..30 {
        let start = random.below(bytes / 512) * 512;
        let length = ((random.below(400) + 1) * 512).min(bytes - start);
        let places = start as usize..(start + length) as usize;
        let writer = node.clone();
        if round % 5 == 4 {
            model[places].fill(0);
            block_on(async move { writer.write_zeroes(start, length, false).await.unwrap() });
        } else {
            let data = random_bytes(length as usize, round);
            model[places].copy_from_slice(&data);
            block_on(async move { writer.write(start, segments(&data), round % 7 == 0).await.unwrap() });
        }
    }
    let writer = node.clone();
    block_on(async move { writer.flush().await.unwrap() });
    assert!(all(&node, bytes) == model, "{format} {what}: after writing");
    assert_same_for_qemu(folder, format, &child.bytes.borrow(), &model);
}

#[test]
fn a_wrong_key_and_a_missing_one_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let child = Memory::new(encrypted(folder.path(), "luks", QUICK, &[1; 4096]), 1);
    let wrong = luks::OpenError::Crypto(CryptoError::WrongKey);
    assert_eq!(open_luks(&child, "hunter3").map(drop), Err(wrong.clone()));
    assert_eq!(wrong.to_string(), "Invalid password, cannot unlock any keyslot");
    assert_eq!(open_luks(&child, "").map(drop), Err(wrong));
    let options = luks::Options {
        key: None,
        ..luks_options(&child, "")
    };
    let missing = block_on(luks::LuksNode::open(child.clone(), options))
        .map(drop)
        .unwrap_err();
    assert_eq!(missing, luks::OpenError::KeyRequired);
    assert_eq!(missing.to_string(), "Parameter 'key-secret' is required for cipher");

    for (options, has_check) in [
        ("encrypt.format=luks,encrypt.iter-time=10", true),
        ("encrypt.format=aes", false),
    ] {
        let child = Memory::new(encrypted(folder.path(), "qcow2", options, &[1; 4096]), 1);
        let missing = open(&child, None).map(drop).unwrap_err();
        assert_eq!(missing, OpenError::KeyRequired);
        assert_eq!(
            missing.to_string(),
            "Parameter 'encrypt.key-secret' is required for cipher"
        );
        match open_encrypted(&child, "hunter3", None) {
            Err(error) => assert_eq!((error, has_check), (CryptoError::WrongKey.into(), true)),
            // The first format cannot tell: what comes out is noise.
            Ok(node) => {
                assert!(!has_check);
                assert!(content(&node) != [1; 4096]);
            }
        }
    }
}

/// What a client is told of an image does not take its key.
#[test]
fn headers_are_read_without_a_key() {
    let folder = tempfile::tempdir().unwrap();
    let child = Memory::new(encrypted(folder.path(), "luks", QUICK, &[1; 4096]), 1);
    let options_of = luks::Options {
        key: None,
        ..luks_options(&child, "")
    };
    let same = child.clone();
    let header = block_on(async move { read_header(&*same, &options_of).await }).unwrap();
    assert_eq!(
        (header.spec.luks_mode().as_str(), header.hash),
        ("xts-plain64", Hash::Sha256)
    );
    assert_eq!((header.payload_offset, header.uuid.len()), (4040 * 512, 36));
    let image = encrypted(
        folder.path(),
        "qcow2",
        "encrypt.format=luks,encrypt.iter-time=10",
        &[1; 4096],
    );
    let child = Memory::new(image, 1);
    let (same, options) = (child.clone(), options(&child));
    let (header, luks) = block_on(async move {
        let header = read_qcow2_header(&*same, &options).await.unwrap();
        let luks = read_luks_header(&header, &*same, &options).await.unwrap();
        (header, luks.expect("a LUKS header"))
    });
    assert!(matches!(header.encryption, Some(Encryption::Luks { bytes, .. }) if bytes == luks.payload_offset));
    assert_eq!(luks.slots.iter().filter(|slot| slot.is_active).count(), 1);
}

#[test]
fn what_is_copied_from_a_backing_file_is_encrypted() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    let plain = random_bytes(1 << 20, 5);
    std::fs::write(&base, &plain[..(1 << 20) - 1024]).unwrap();
    for options in [
        "encrypt.format=luks,encrypt.iter-time=10",
        "encrypt.format=aes",
        "encrypt.format=aes,compat=0.10",
        "encrypt.format=luks,encrypt.iter-time=10,extended_l2=on,cluster_size=64k",
    ] {
        let image = folder.path().join("top");
        let options = format!(
            "{options},encrypt.key-secret=s,backing_file={},backing_fmt=raw",
            base.display()
        );
        let image_name = image.to_str().unwrap();
        qemu_img_encrypted(&["create", "-q", "-f", "qcow2", "-o", &options, image_name, "1M"]);
        let child = Memory::new(std::fs::read(&image).unwrap(), 1);
        let backing = Memory::new(std::fs::read(&base).unwrap(), 2);
        let node = open_encrypted(&child, PASSWORD, Some(backing)).unwrap();
        let mut model = plain.clone();
        model[(1 << 20) - 1024..].fill(0);
        for start in [512, 100 << 10, (1 << 20) - 512] {
            model[start..start + 512].fill(9);
        }
        model[300 << 10..400 << 10].fill(0);
        let writer = node.clone();
        block_on(async move {
            for start in [512, 100 << 10, (1 << 20) - 512] {
                writer.write(start, segments(&[9; 512]), false).await.unwrap();
            }
            writer.write_zeroes(300 << 10, 100 << 10, true).await.unwrap();
            writer.flush().await.unwrap();
        });
        assert!(content(&node) == model, "{options}");
        assert_same_for_qemu(folder.path(), "qcow2", &child.bytes.borrow(), &model);
        // No sector of the backing file, and none of the guest's, is in the image.
        let image = child.bytes.borrow();
        for sector in image.chunks(512) {
            let is_plain = plain.chunks(512).take(300).any(|plain| plain == sector);
            assert!(!is_plain && sector != [9; 512], "{options}");
        }
    }
}

#[test]
fn pieces_of_sectors_are_read_and_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_bytes(1 << 20, 11);
    for (format, options) in [("luks", QUICK), ("qcow2", "encrypt.format=luks,encrypt.iter-time=10")] {
        let child = Memory::new(encrypted(folder.path(), format, options, &model), 1);
        let (node, _) = open_any(&child, format, None);
        let before = child.bytes.borrow().clone();
        let model = model.clone();
        block_on(async move {
            for (start, bytes) in [(1, 1), (511, 2), (700, 300_000), (4096, 100), (262_143, 262_146)] {
                let now = read(&*node, start as u64, bytes).await.unwrap();
                assert!(now == model[start..start + bytes], "{format}: {bytes} at {start}");
            }
            assert_eq!(node.write(1, segments(&[1; 512]), false).await, Err(Errno::EINVAL));
            assert_eq!(node.write(512, segments(&[1; 100]), false).await, Err(Errno::EINVAL));
            assert_eq!(node.write_zeroes(0, 100, false).await, Err(Errno::EINVAL));
        });
        assert!(*child.bytes.borrow() == before);
    }
}

fn create_options(spec: Spec, hash: Hash) -> CreateOptions {
    CreateOptions {
        spec,
        hash,
        iterations: Iterations::Count(1000),
    }
}

/// A new LUKS image with room for so many bytes.
fn created(options: CreateOptions, bytes: u64) -> Rc<Memory> {
    let child = Memory::new(Vec::new(), 1);
    let same = child.clone();
    let payload = block_on(async move {
        let mut random = Csprng::from_seed(&Seed::new([9; 32]));
        format(&*same, &options, 512, &secret(PASSWORD).unwrap(), &mut random)
            .await
            .unwrap()
    });
    assert_eq!(payload, options.area_bytes());
    child.bytes.borrow_mut().resize((payload + bytes) as usize, 0);
    child
}

/// cryptsetup, with a password on its standard input.
fn cryptsetup(arguments: &[&str], password: &str) -> Result<String, String> {
    use std::io::Write as _;
    let mut child = Command::new("cryptsetup")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cryptsetup: {error}: `make packages` installs cryptsetup-bin"));
    let mut stdin = child.stdin.take().unwrap();
    // Commands that want no password may be gone already.
    let _ = stdin.write_all(password.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stderr)),
    }
}

/// Few iterations, no questions.
const QUICK_FORMAT: [&str; 3] = ["--pbkdf-force-iterations", "1000", "-q"];
/// Where cryptsetup begins a payload because it is told so, bytes.
const PAYLOAD_BY_CRYPTSETUP: usize = 2 << 20;

fn luks_format(image: &Path, cipher: &str, bits: &str, hash: &str, password: &str) {
    let algorithms = [
        "--cipher",
        cipher,
        "-s",
        bits,
        "--hash",
        hash,
        "--align-payload",
        "4096",
    ];
    let files = ["luksFormat", "--type", "luks1", image.to_str().unwrap(), "-"];
    cryptsetup(&[&QUICK_FORMAT[..], &algorithms, &files].concat(), password).unwrap();
}

fn opens_in_cryptsetup(image: &Path, password: &str) -> bool {
    let image = image.to_str().unwrap();
    let opened = cryptsetup(
        &["open", "--test-passphrase", "--type", "luks1", "--key-file", "-", image],
        password,
    );
    opened.is_ok()
}

#[test]
fn headers_that_we_make_open_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("ours");
    for (spec, hash) in [
        (Spec::of_qemu(None, None, None, None), Hash::Sha256),
        (Spec::of_qemu(Some("aes-128"), None, None, None), Hash::Sha1),
        (
            Spec::of_qemu(None, Some("cbc"), Some("essiv"), Some("sha256")),
            Hash::Sha512,
        ),
        (Spec::of_qemu(Some("aes-128"), Some("cbc"), None, None), Hash::Ripemd160),
    ] {
        let options = create_options(spec.unwrap(), hash);
        let child = created(options, 1 << 20);
        let node = open_luks(&child, PASSWORD).unwrap();
        assert_eq!(node.bytes(), 1 << 20);
        assert_eq!(
            open_luks(&child, "hunter3").map(drop),
            Err(CryptoError::WrongKey.into())
        );
        let data = random_bytes(1 << 20, 21);
        let same = data.clone();
        block_on(async move { node.write(0, segments(&same), false).await.unwrap() });
        assert_same_for_qemu(folder.path(), "luks", &child.bytes.borrow(), &data);
        save(&child, image.clone());
        assert!(opens_in_cryptsetup(&image, PASSWORD), "{options:?}");
        assert!(!opens_in_cryptsetup(&image, "hunter3"), "{options:?}");
        let dump = cryptsetup(&["luksDump", image.to_str().unwrap()], "").unwrap();
        assert!(
            dump.contains(&options.spec.luks_mode()) && dump.contains("Key Slot 7: DISABLED"),
            "{dump}"
        );
    }
}

#[test]
fn slots_that_cryptsetup_makes_open_here() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("theirs");
    let name = image.to_str().unwrap();
    for (cipher, bits, hash) in [
        ("aes-xts-plain64", "512", "sha256"),
        ("aes-xts-plain64", "256", "ripemd160"),
        ("aes-cbc-essiv:sha256", "256", "sha512"),
        ("aes-cbc-plain64", "128", "sha1"),
        ("aes-cbc-plain", "192", "sha256"),
    ] {
        std::fs::write(&image, vec![0; PAYLOAD_BY_CRYPTSETUP + (1 << 20)]).unwrap();
        luks_format(&image, cipher, bits, hash, "first");
        // A second password, in the slot that it is told.
        let second = folder.path().join("second");
        std::fs::write(&second, PASSWORD).unwrap();
        let add = [
            "luksAddKey",
            "--key-slot",
            "5",
            "--key-file",
            "-",
            name,
            second.to_str().unwrap(),
        ];
        cryptsetup(&[&QUICK_FORMAT[..], &add].concat(), "first").unwrap();
        let child = Memory::new(std::fs::read(&image).unwrap(), 1);
        let header = open_luks(&child, PASSWORD).unwrap().header().clone();
        assert!(header.slots[0].is_active && header.slots[5].is_active);
        // What both keys open is the same.
        let (one, two) = (
            open_luks(&child, PASSWORD).unwrap(),
            open_luks(&child, "first").unwrap(),
        );
        block_on(async move {
            one.write(4096, segments(&[3; 4096]), false).await.unwrap();
            assert_eq!(read(&*two, 4096, 4096).await.unwrap(), [3; 4096]);
        });
        assert!(open_luks(&child, "third").is_err());
    }
}

/// `iter-time` is kept, roughly: the machine that runs this does other things, too.
#[test]
fn iterations_follow_the_time_that_is_asked_for() {
    let iterations = |time| {
        let options = CreateOptions {
            iterations: Iterations::Time(Duration::from_millis(time)),
            ..create_options(Spec::of_qemu(None, None, None, None).unwrap(), Hash::Sha256)
        };
        let child = created(options, 512);
        let node = open_luks(&child, PASSWORD).unwrap();
        let header = node.header();
        assert_eq!(header.digest_iterations, (header.slots[0].iterations / 8).max(1000));
        header.slots[0].iterations
    };
    let (short, long) = (iterations(20), iterations(400));
    assert!(short >= 1000 && long > 4 * short, "{short} and {long}");
}

#[test]
fn nothing_of_the_guest_reaches_the_image_in_the_clear() {
    let folder = tempfile::tempdir().unwrap();
    let image = encrypted(
        folder.path(),
        "qcow2",
        "encrypt.format=luks,encrypt.iter-time=10",
        &[1; 1 << 20],
    );
    let watched = Rc::new(Watched {
        child: Memory::new(image, 1),
        written: Default::default(),
    });
    let options = Options {
        key: secret(PASSWORD),
        ..options(&watched.child)
    };
    let node = block_on(block_proc::node::qcow2::Qcow2Node::open(
        watched.clone(),
        options,
        Children::default(),
    ))
    .unwrap();
    let writer = node.clone();
    block_on(async move {
        for start in 0..100_u64 {
            let text = b"the guest's own words ".repeat(40);
            writer.write(start * 8192, segments(&text[..512]), true).await.unwrap();
        }
        writer.flush().await.unwrap();
    });
    let written = watched.written.borrow();
    assert!(written.len() >= 100 * 512);
    assert!(!written.windows(16).any(|bytes| bytes == b"the guest's own "));
}

/// Images that are created and then encrypted: what `blockdev-create` does.
#[test]
fn new_images_that_we_encrypt_open_in_qemu() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("a-base");
    std::fs::write(&base, random_bytes(1 << 20, 4)).unwrap();
    let backed = format!("backing_file={},backing_fmt=raw", base.display());
    let luks = |options| NewEncryption::Luks(create_options(options, Hash::Sha256));
    let default = Spec::of_qemu(None, None, None, None).unwrap();
    let small = Spec::of_qemu(Some("aes-128"), Some("cbc"), None, None).unwrap();
    for (options, encryption) in [
        ("", luks(default)),
        ("compat=0.10", luks(small)),
        ("cluster_size=512", luks(default)),
        // The counts' table is too small for a header of 2 MiB.
        ("cluster_size=512,refcount_bits=64", luks(default)),
        ("cluster_size=4k,refcount_bits=1", luks(default)),
        ("cluster_size=2M", luks(small)),
        (&backed, luks(default)),
        ("", NewEncryption::Aes),
        (&backed, NewEncryption::Aes),
    ] {
        let child = Memory::new(create(folder.path(), options, 1 << 20), 1);
        let (same, how) = (child.clone(), self::options(&child));
        block_on(async move {
            let mut random = Csprng::from_seed(&Seed::new([5; 32]));
            let key = secret(PASSWORD).unwrap();
            encrypt(same, how, encryption, &key, &mut random).await.unwrap();
        });
        let backing = (options == backed).then(|| Memory::new(std::fs::read(&base).unwrap(), 2) as Rc<dyn Node>);
        let mut model = if backing.is_some() {
            std::fs::read(&base).unwrap()
        } else {
            vec![0; 1 << 20]
        };
        let node = open_encrypted(&child, PASSWORD, backing).unwrap();
        assert!(content(&node) == model, "{options}");
        let data = random_bytes(100 << 10, 8);
        model[50 << 10..150 << 10].copy_from_slice(&data);
        block_on(async move {
            node.write(50 << 10, segments(&data), false).await.unwrap();
            node.flush().await.unwrap();
        });
        assert_same_for_qemu(folder.path(), "qcow2", &child.bytes.borrow(), &model);
    }
}

#[test]
fn an_image_is_not_encrypted_without_room_or_twice() {
    let folder = tempfile::tempdir().unwrap();
    let encrypt_it = |child: &Rc<Memory>| {
        let (same, how) = (child.clone(), options(child));
        let spec = Spec::of_qemu(Some("aes-128"), None, None, None).unwrap();
        let luks = NewEncryption::Luks(create_options(spec, Hash::Sha256));
        block_on(async move {
            let mut random = Csprng::from_seed(&Seed::new([5; 32]));
            encrypt(same, how, luks, &secret(PASSWORD).unwrap(), &mut random).await
        })
    };
    let path = folder.path().join("image");
    std::fs::write(&path, create(folder.path(), "cluster_size=512,compat=0.10", 1 << 20)).unwrap();
    // With the longest names there is room for, and with one that leaves 16 bytes.
    for (length, fits) in [(350, true), (400, false)] {
        let name = format!("/{}", "n".repeat(length));
        qemu_img(&["rebase", "-u", "-b", &name, "-F", "raw", path.to_str().unwrap()]);
        let image = std::fs::read(&path).unwrap();
        let child = Memory::new(image.clone(), 1);
        match (encrypt_it(&child), fits) {
            (Ok(()), true) => {
                let options = options(&child);
                let header = block_on(async move { read_qcow2_header(&*child, &options).await }).unwrap();
                assert_eq!(header.backing_name, Some(name));
                assert_eq!(header.backing_format.as_deref(), Some("raw"));
            }
            (Err(error), false) => {
                assert!(error.to_string().contains("no room"), "{error}");
                assert!(*child.bytes.borrow() == image, "something was written");
            }
            (result, _) => panic!("a name of {length} bytes: {result:?}"),
        }
    }
    let child = Memory::new(create(folder.path(), "", 1 << 20), 1);
    encrypt_it(&child).unwrap();
    assert!(
        encrypt_it(&child)
            .unwrap_err()
            .to_string()
            .contains("encrypted already")
    );
}
