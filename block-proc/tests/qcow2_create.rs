//! Images that we make: QEMU's tools find nothing wrong with them, and see in them what was asked for.

mod qcow2_common;

use block_proc::node::qcow2::Children;
use block_proc::node::{ExtentKind, Node};
use ipc::graph::{CreateQcow2, NodeDetails, Preallocation};
use qcow2_common::*;
use std::path::Path;

fn info(path: &Path) -> String {
    qemu_img(&["info", "-U", "--output=json", "-f", "qcow2", path.to_str().unwrap()])
}

fn expect(spec: &CreateQcow2, info: &str) {
    let has = |what: &str| assert!(info.contains(what), "{spec:?}: {what} is not in {info}");
    has(&format!("\"virtual-size\": {}", spec.bytes));
    has(&format!("\"cluster-size\": {}", spec.cluster_bytes));
    has(&format!(
        "\"compat\": \"{}\"",
        if spec.version == 3 { "1.1" } else { "0.10" }
    ));
    if spec.version == 3 {
        has(&format!("\"refcount-bits\": {}", spec.refcount_bits));
        has(&format!("\"lazy-refcounts\": {}", spec.lazy_refcounts));
        has(&format!("\"extended-l2\": {}", spec.extended_l2));
        has(if spec.zstd { "\"zstd\"" } else { "\"zlib\"" });
    }
    if let Some((name, format)) = &spec.backing {
        has(&format!("\"backing-filename\": \"{name}\""));
        has(&format!(
            "\"backing-filename-format\": \"{}\"",
            format.as_ref().unwrap()
        ));
    }
}

fn specs() -> Vec<CreateQcow2> {
    let mut specs = Vec::new();
    for bits in 9..=21 {
        for version in [2, 3] {
            for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Full] {
                specs.push(CreateQcow2 {
                    bytes: (5 << 20) + 512,
                    version,
                    cluster_bytes: 1 << bits,
                    preallocation,
                    ..CreateQcow2::default()
                });
            }
        }
    }
    for order in 0..=6 {
        for (cluster_bytes, bytes) in [(512, 4 << 20), (65536, 300 << 20)] {
            specs.push(CreateQcow2 {
                bytes,
                cluster_bytes,
                refcount_bits: 1 << order,
                lazy_refcounts: order % 2 == 0,
                zstd: order % 3 == 0,
                preallocation: if bytes < 10 << 20 {
                    Preallocation::Falloc
                } else {
                    Preallocation::Off
                },
                ..CreateQcow2::default()
            });
        }
    }
    for bits in [14, 16, 21] {
        for preallocation in [Preallocation::Off, Preallocation::Metadata] {
            specs.push(CreateQcow2 {
                bytes: (9 << 20) + 1024,
                cluster_bytes: 1 << bits,
                extended_l2: true,
                preallocation,
                ..CreateQcow2::default()
            });
        }
    }
    for bytes in [0, 512, 1 << 40] {
        specs.push(CreateQcow2 {
            bytes,
            ..CreateQcow2::default()
        });
    }
    specs
}

#[test]
fn images_of_every_kind_are_sound_and_empty() {
    let folder = tempfile::tempdir().unwrap();
    let (image, raw) = (folder.path().join("image"), folder.path().join("raw"));
    for spec in specs() {
        let child = make(&spec, None).unwrap_or_else(|error| panic!("{spec:?}: {error}"));
        save(&child, image.clone());
        assert_eq!(check(&image).0, 0, "{spec:?}: {}", check(&image).1);
        expect(&spec, &info(&image));
        if spec.bytes == 0 || spec.bytes > 1 << 30 {
            continue;
        }
        std::fs::File::create(&raw).unwrap().set_len(spec.bytes).unwrap();
        let names = [image.to_str().unwrap(), raw.to_str().unwrap()];
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", names[0], names[1]]);
        // We write, then QEMU writes, then both look.
        let node = open(&child, None).unwrap_or_else(|error| panic!("{spec:?}: {error}"));
        let half = spec.bytes / 1024 * 512;
        let writer = node.clone();
        block_on(async move {
            writer.write(half, segments(&[7; 512]), false).await.unwrap();
            writer.flush().await.unwrap();
        });
        save(&child, image.clone());
        qemu_io(
            &image,
            &[
                &format!("read -P 7 {half} 512"),
                &format!("write -P 9 {} 512", spec.bytes - 512),
            ],
        );
        assert_eq!(check(&image).0, 0, "{spec:?}: {}", check(&image).1);
        let again = open(&Memory::new(std::fs::read(&image).unwrap(), 1), None).unwrap();
        let last = spec.bytes - 512;
        let found = block_on(async move { read(&*again, last, 512).await.unwrap() });
        assert_eq!(found, [9; 512], "{spec:?}");
    }
}

#[test]
fn names_of_backing_files_are_in_the_header() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    for version in [2, 3] {
        for (cluster_bytes, length) in [(512, 20), (4096, 300), (65536, 1023)] {
            let spec = CreateQcow2 {
                bytes: 1 << 20,
                version,
                cluster_bytes,
                backing: Some(("b".repeat(length), Some("raw".into()))),
                ..CreateQcow2::default()
            };
            let child = make(&spec, None).unwrap();
            save(&child, image.clone());
            expect(&spec, &info(&image));
        }
    }
    for (cluster_bytes, length, errno) in [
        (65536, 1024, nix::errno::Errno::EINVAL),
        (512, 500, nix::errno::Errno::ENOSPC),
    ] {
        let spec = CreateQcow2 {
            bytes: 1 << 20,
            cluster_bytes,
            backing: Some(("b".repeat(length), Some("raw".into()))),
            ..CreateQcow2::default()
        };
        assert_eq!(make(&spec, None).map(drop).unwrap_err().errno, Some(errno as i32));
    }
}

#[test]
fn a_name_can_be_written_over_another_and_taken_out() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    for version in [2, 3] {
        let spec = CreateQcow2 {
            bytes: 1 << 20,
            version,
            backing: Some(("old".into(), Some("qcow2".into()))),
            ..CreateQcow2::default()
        };
        let child = make(&spec, None).unwrap();
        let children = Children {
            without_backing: true,
            ..Children::default()
        };
        let node = open_children(&child, options(&child), children).unwrap();
        for (name, format) in [
            ("another-name", Some("raw")),
            ("x", None),
            (&"n".repeat(1000)[..], Some("qcow2")),
        ] {
            let renamed = node.clone();
            let backing = Some((name.to_owned(), format.map(str::to_owned)));
            block_on(async move {
                renamed.set_backing_name(backing).await.unwrap();
                renamed.write(0, segments(&[3; 512]), false).await.unwrap();
                renamed.flush().await.unwrap();
            });
            save(&child, image.clone());
            let said = info(&image);
            assert!(said.contains(&format!("\"backing-filename\": \"{name}\"")), "{said}");
            let said_format = said.contains("backing-filename-format");
            assert_eq!(said_format, format.is_some(), "{said}");
            let details = block_on({
                let node = node.clone();
                async move { node.details().await.unwrap() }
            });
            let NodeDetails::Qcow2(details) = details else {
                panic!("it is qcow2")
            };
            assert_eq!(details.backing, Some((name.into(), format.map(Into::into))));
        }
        let renamed = node.clone();
        let (long, gone) = block_on(async move {
            let long = renamed.set_backing_name(Some(("n".repeat(1024), None))).await;
            (long, renamed.set_backing_name(None).await)
        });
        assert_eq!(long.unwrap_err().errno, Some(nix::errno::Errno::EINVAL as i32));
        gone.unwrap();
        save(&child, image.clone());
        assert!(!info(&image).contains("backing-filename"));
        assert_eq!(check(&image).0, 0);
    }
}

#[test]
fn what_contradicts_itself_is_refused_in_words_that_clients_know() {
    let base = || CreateQcow2 {
        bytes: 1 << 20,
        ..CreateQcow2::default()
    };
    let cases: [(CreateQcow2, &str); 14] = [
        (
            CreateQcow2 { bytes: 1234, ..base() },
            "Image size must be a multiple of 512 bytes",
        ),
        (
            CreateQcow2 {
                cluster_bytes: 1234,
                ..base()
            },
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            CreateQcow2 {
                cluster_bytes: 4 << 20,
                ..base()
            },
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            CreateQcow2 {
                extended_l2: true,
                cluster_bytes: 4096,
                ..base()
            },
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ),
        (
            CreateQcow2 {
                extended_l2: true,
                version: 2,
                ..base()
            },
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            CreateQcow2 {
                backing: Some(("b".into(), None)),
                preallocation: Preallocation::Metadata,
                ..base()
            },
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ),
        (
            CreateQcow2 {
                lazy_refcounts: true,
                version: 2,
                ..base()
            },
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            CreateQcow2 {
                refcount_bits: 7,
                ..base()
            },
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            CreateQcow2 {
                refcount_bits: 8,
                version: 2,
                ..base()
            },
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        ),
        (
            CreateQcow2 {
                data_file: Some(("d".into(), false)),
                version: 2,
                ..base()
            },
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            CreateQcow2 {
                data_file: Some(("d".into(), true)),
                backing: Some(("b".into(), None)),
                ..base()
            },
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        (
            CreateQcow2 {
                zstd: true,
                version: 2,
                ..base()
            },
            "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            CreateQcow2 {
                bytes: (1 << 63) - 512,
                ..base()
            },
            "Could not resize image: offset(9223372036854775296) exceeds maximum(9223372035781033984)",
        ),
        (
            CreateQcow2 {
                bytes: 1 << 48,
                cluster_bytes: 512,
                ..base()
            },
            "Could not resize image: Failed to grow the L1 table: File too large",
        ),
    ];
    for (spec, said) in cases {
        assert_eq!(make(&spec, None).map(drop).unwrap_err().message, said);
    }
}

/// Guest data is in another file, at the same offsets.
#[test]
fn an_external_data_file_has_the_data() {
    let folder = tempfile::tempdir().unwrap();
    let (image, data) = (folder.path().join("image"), folder.path().join("data"));
    for raw in [false, true] {
        for (cluster_bytes, extended_l2) in [(512, false), (65536, false), (16384, true)] {
            let spec = CreateQcow2 {
                bytes: (1 << 20) + 512,
                cluster_bytes,
                extended_l2,
                data_file: Some((data.to_str().unwrap().into(), raw)),
                ..CreateQcow2::default()
            };
            let data_node = Memory::new(vec![0x77; 5000], 2);
            let child = make(&spec, Some(data_node.clone())).unwrap();
            if raw {
                data_node.bytes.borrow_mut().fill(0);
            }
            let children = || Children {
                data_file: Some(data_node.clone()),
                ..Children::default()
            };
            let node = open_children(&child, options(&child), children()).unwrap();
            let mut random = Random::new(u64::from(cluster_bytes));
            let mut model = vec![0; spec.bytes as usize];
            for round in 0..200_u64 {
                let start = random.below(spec.bytes / 512) * 512;
                let length = ((random.below(40) + 1) * 512).min(spec.bytes - start);
                let range = start as usize..(start + length) as usize;
                let fill = (random.next() | 1) as u8;
                let writer = node.clone();
                let kind = random.below(8);
                let found = block_on(async move {
                    match kind {
                        0..4 => {
                            writer
                                .write(start, segments(&vec![fill; length as usize]), round % 9 == 0)
                                .await
                        }
                        4..6 => writer.write_zeroes(start, length, kind == 4).await,
                        6 => writer.flush().await,
                        _ => writer.discard(start, length).await,
                    }
                    .unwrap();
                    read(&*writer, start, length as usize).await.unwrap()
                });
                match kind {
                    0..4 => model[range].fill(fill),
                    4..6 => model[range].fill(0),
                    6 => assert!(found == model[range]),
                    _ => model[range].copy_from_slice(&found),
                }
            }
            let closed = node.clone();
            block_on(async move { closed.flush().await.unwrap() });
            assert!(content(&node) == model);
            save(&child, image.clone());
            save(&data_node, data.clone());
            assert_eq!(
                data_node.bytes.borrow().len() as u64,
                spec.bytes,
                "it is as long as the disk"
            );
            assert_eq!(check(&image).0, 0, "{spec:?}: {}", check(&image).1);
            let model_path = folder.path().join("model");
            std::fs::write(&model_path, &model).unwrap();
            let names = [image.to_str().unwrap(), model_path.to_str().unwrap()];
            qemu_img(&["compare", "-f", "qcow2", "-F", "raw", names[0], names[1]]);
            if raw {
                assert!(*data_node.bytes.borrow() == model, "the data file alone is the disk");
            }
            let again = open_children(&child, options(&child), children()).unwrap();
            assert!(content(&again) == model);
            assert!(open(&child, None).is_err(), "without its data file it is not opened");
        }
    }
}

/// What QEMU says of each byte, and what we say of it.
#[test]
fn status_tells_data_zeroes_and_holes_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for options in ["cluster_size=4k", "extended_l2=on", "cluster_size=64k"] {
        std::fs::write(&path, create(folder.path(), options, 8 << 20)).unwrap();
        qemu_io(
            &path,
            &[
                "write -P 7 0 2M",
                "write -z 1M 512k",
                "write -P 3 5M 64k",
                "write -z 7M 128k",
            ],
        );
        let node = open(&Memory::new(std::fs::read(&path).unwrap(), 1), None).unwrap();
        let extents = block_on(async move {
            let mut extents = Vec::new();
            let mut at = 0;
            while at < 8 << 20 {
                let extent = node.status(at, (8 << 20) - at).await.unwrap();
                extents.push((extent.bytes >> 10, extent.kind));
                at += extent.bytes;
            }
            extents
        });
        use ExtentKind::{Data, Unallocated, Zero};
        assert_eq!(
            extents,
            [
                (1024, Data),
                (512, Zero),
                (512, Data),
                (3072, Unallocated),
                (64, Data),
                (1984, Unallocated),
                (128, Zero),
                (896, Unallocated)
            ],
            "{options}"
        );
    }
}
