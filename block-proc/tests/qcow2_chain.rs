//! Chains of images at random, on us and on plain arrays: writes, zeroes, discards, snapshots in images and over them, going
//! back to both (by us, and by QEMU on the image's file), other sizes, commits by hand (and by QEMU).

mod qcow2_common;

use block_proc::node::qcow2::Qcow2Node;
use block_proc::node::{ExtentKind, Node, pass_down};
use ipc::graph::{CreateQcow2, Preallocation};
use qcow2_common::*;
use std::path::{Path, PathBuf};
use std::rc::Rc;

const SECTOR: u64 = 512;
const MOST_LAYERS: usize = 4;

struct Layer {
    child: Rc<Memory>,
    node: Rc<Qcow2Node>,
    /// What is read from it.
    model: Vec<u8>,
    /// What was read from it when a snapshot of this name was made.
    snapshots: Vec<(String, Vec<u8>)>,
}

struct Chain {
    folder: PathBuf,
    spec: CreateQcow2,
    /// The lowest first.
    layers: Vec<Layer>,
    next_id: u32,
}

fn file_name(number: usize) -> String {
    format!("image{number}")
}

impl Chain {
    fn new(folder: &Path, spec: &CreateQcow2) -> Self {
        let mut chain = Self {
            folder: folder.to_owned(),
            spec: spec.clone(),
            layers: Vec::new(),
            next_id: 1,
        };
        chain.push(spec.bytes);
        chain
    }

    fn top(&mut self) -> &mut Layer {
        self.layers.last_mut().expect("an image")
    }

    /// An empty image over all others.
    fn push(&mut self, bytes: u64) {
        let below = self.layers.last();
        let backing = below.map(|_| (file_name(self.layers.len() - 1), Some("qcow2".to_owned())));
        let spec = CreateQcow2 {
            bytes,
            backing,
            ..self.spec.clone()
        };
        let child = make(&spec, None).expect("an image");
        let node = open(&child, below.map(|below| below.node.clone() as Rc<dyn Node>)).expect("the image");
        let model = below.map_or(vec![0; bytes as usize], |below| below.model.clone());
        self.layers.push(Layer {
            child,
            node,
            model,
            snapshots: Vec::new(),
        });
    }

    fn flush(&self) {
        for layer in &self.layers {
            let node = layer.node.clone();
            block_on(async move { node.flush().await.expect("a flush") });
        }
    }

    /// Closes all images and opens them again.
    fn reopen(&mut self) {
        self.flush();
        for number in 0..self.layers.len() {
            let below = number
                .checked_sub(1)
                .map(|below| self.layers[below].node.clone() as Rc<dyn Node>);
            self.layers[number].node = open(&self.layers[number].child, below).expect("the image again");
        }
    }

    fn save(&self) {
        self.flush();
        for (number, layer) in self.layers.iter().enumerate() {
            save(&layer.child, self.folder.join(file_name(number)));
        }
    }

    /// Has QEMU do something with the files.
    fn by_qemu(&mut self, arguments: &[&str]) {
        self.save();
        let path = self.folder.join(file_name(self.layers.len() - 1));
        qemu_img(&[arguments, &[path.to_str().unwrap()]].concat());
        for (number, layer) in self.layers.iter().enumerate() {
            layer
                .child
                .bytes
                .replace(std::fs::read(self.folder.join(file_name(number))).unwrap());
        }
        for number in 0..self.layers.len() {
            let below = number
                .checked_sub(1)
                .map(|below| self.layers[below].node.clone() as Rc<dyn Node>);
            self.layers[number].node = open(&self.layers[number].child, below).expect("QEMU's image");
        }
    }

    fn request(&mut self, random: &mut Random) {
        let layer = self.top();
        let size = layer.node.bytes();
        let start = random.below(size / SECTOR) * SECTOR;
        let length = ((random.below(100) + 1) * SECTOR).min(size - start);
        let range = start as usize..(start + length) as usize;
        let (kind, fill, node) = (random.below(8), (random.next() | 1) as u8, layer.node.clone());
        let found = block_on(async move {
            match kind {
                0..4 => {
                    node.write(start, segments(&vec![fill; length as usize]), fill & 2 != 0)
                        .await
                }
                4 => node.write_zeroes(start, length, fill & 2 != 0).await,
                5 => node.discard(start, length).await,
                6 => node.flush().await,
                _ => Ok(()),
            }
            .expect("a request");
            read(&*node, start, length as usize).await.expect("a read")
        });
        match kind {
            0..4 => layer.model[range.clone()].fill(fill),
            4 => layer.model[range.clone()].fill(0),
            // What it reads as afterwards is not defined.
            5 => layer.model[range.clone()].copy_from_slice(&found),
            _ => {}
        }
        assert!(found == layer.model[range], "{length} bytes at {start}");
    }

    /// Does something with the images themselves.
    fn change(&mut self, random: &mut Random) -> String {
        let depth = self.layers.len();
        let next_id = self.next_id;
        let layer = self.top();
        let which = random.below(layer.snapshots.len().max(1) as u64) as usize;
        match random.below(9) {
            0 if depth < MOST_LAYERS => {
                let bytes = layer.node.bytes();
                self.push(bytes);
                "a snapshot over it".into()
            }
            1 | 2 => {
                let info = snapshot_info(&next_id.to_string());
                let (node, name) = (layer.node.clone(), info.name.clone());
                block_on(async move { node.create_snapshot(&info).await }).expect("a snapshot");
                layer.snapshots.push((name, layer.model.clone()));
                self.next_id += 1;
                "a snapshot in it".into()
            }
            3 if !layer.snapshots.is_empty() => {
                let (name, model) = layer.snapshots[which].clone();
                let (node, id) = (layer.node.clone(), name.trim_start_matches("name-").to_owned());
                block_on(async move { node.revert_to_snapshot(&id).await }).expect("going back");
                layer.model = model;
                format!("back to {name}")
            }
            4 if !layer.snapshots.is_empty() => {
                let (name, model) = layer.snapshots[which].clone();
                layer.model = model;
                self.by_qemu(&["snapshot", "-a", &name]);
                format!("back to {name} by the image")
            }
            5 if depth > 1 => {
                self.layers.pop();
                let bytes = self.top().node.bytes();
                self.push(bytes);
                "back to the image below".into()
            }
            6 => {
                let bytes = (random.below(4096) + 1) * SECTOR;
                let node = layer.node.clone();
                block_on(async move { node.resize(bytes, Preallocation::Off).await }).expect("another size");
                layer.model.resize(bytes as usize, 0);
                format!("{bytes} bytes")
            }
            7 | 8 if depth > 1 => {
                let by_qemu = random.below(2) == 0;
                if by_qemu {
                    self.by_qemu(&["commit", "-q", "-d", "-f", "qcow2"]);
                } else {
                    self.commit_by_hand();
                }
                let above = self.layers.pop().expect("an image").model;
                let below = &mut self.top().model;
                below.resize(below.len().max(above.len()), 0);
                below[..above.len()].copy_from_slice(&above);
                format!("a commit, by {}", if by_qemu { "QEMU" } else { "hand" })
            }
            _ => "nothing".into(),
        }
    }

    /// Writes what the top image has of its own to the one below.
    fn commit_by_hand(&mut self) {
        let [.., below, top] = &self.layers[..] else {
            panic!("one image has nothing below")
        };
        let (below, top) = (below.node.clone(), top.node.clone());
        block_on(async move {
            let end = top.bytes();
            if below.bytes() < end {
                below.resize(end, Preallocation::Off).await.expect("more room");
            }
            let mut at = 0;
            while at < end {
                let extent = top.status(at, end - at).await.expect("a status");
                match extent.kind {
                    ExtentKind::Data => {
                        let data = read(&*top, at, extent.bytes as usize).await.expect("a read");
                        below.write(at, segments(&data), false).await.expect("a write");
                    }
                    ExtentKind::Zero => below.write_zeroes(at, extent.bytes, true).await.expect("zeroes"),
                    ExtentKind::Unallocated => {}
                }
                at += extent.bytes;
            }
            below.flush().await.expect("a flush");
        });
    }

    fn check(&self, what: &str) {
        for (number, layer) in self.layers.iter().enumerate() {
            assert!(content(&layer.node) == layer.model, "{what}: image {number}");
        }
    }

    /// QEMU's tools find nothing wrong, and read the same.
    fn check_by_qemu(&self, what: &str) {
        self.save();
        for (number, layer) in self.layers.iter().enumerate() {
            let image = self.folder.join(file_name(number));
            let (code, said) = check(&image);
            assert_eq!(code, 0, "{what}: image {number}: {said}");
            let raw = self.folder.join("raw");
            std::fs::write(&raw, &layer.model).unwrap();
            let (image, raw) = (image.to_str().unwrap(), raw.to_str().unwrap());
            qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", image, raw]);
        }
    }
}

fn run(spec: &CreateQcow2, rounds: u64, seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(seed);
    let mut chain = Chain::new(folder.path(), spec);
    for round in 0..rounds {
        for _ in 0..random.below(10) {
            chain.request(&mut random);
        }
        let done = chain.change(&mut random);
        let what = format!(
            "{} bytes per cluster, seed {seed}, round {round}: {done}",
            spec.cluster_bytes
        );
        if random.below(4) == 0 {
            chain.reopen();
        }
        chain.check(&what);
        if round % 10 == 9 {
            chain.check_by_qemu(&what);
        }
    }
}

#[test]
fn chains_at_random_are_what_a_plain_model_says() {
    for (seed, (cluster_bytes, extended_l2)) in [(512, false), (4096, false), (65536, false), (16384, true)]
        .into_iter()
        .cycle()
        .take(8)
        .enumerate()
    {
        let spec = CreateQcow2 {
            bytes: 1 << 20,
            cluster_bytes,
            extended_l2,
            ..CreateQcow2::default()
        };
        run(&spec, 60, seed as u64);
    }
}

/// What is read of clusters that lie in different images of a long chain comes from there, past all that have nothing.
#[test]
fn a_long_chain_is_passed_in_one_go() {
    const CLUSTER: u64 = 64 << 10;
    const LAYERS: u64 = 60;
    /// An image that is half as large hides the rest of those below it.
    const SHORT: u64 = LAYERS / 2;
    let folder = tempfile::tempdir().unwrap();
    let spec = CreateQcow2 {
        bytes: LAYERS * CLUSTER,
        cluster_bytes: CLUSTER as u32,
        ..CreateQcow2::default()
    };
    let mut chain = Chain::new(folder.path(), &spec);
    // Every image has one cluster, the lowest the last.
    let place_of = |layer: u64| LAYERS - 1 - layer;
    for layer in 0..LAYERS {
        if layer > 0 {
            chain.push(if layer == SHORT { SHORT } else { LAYERS } * CLUSTER);
        }
        let node = chain.top().node.clone();
        let data = vec![layer as u8 + 1; CLUSTER as usize];
        block_on(async move { node.write(place_of(layer) * CLUSTER, segments(&data), false).await }).unwrap();
    }
    chain.reopen();
    let nodes: Vec<Rc<Qcow2Node>> = chain.layers.iter().map(|layer| layer.node.clone()).collect();
    let top = nodes.last().unwrap();
    for (place, cluster) in (0..).zip(content(top).chunks(CLUSTER as usize)) {
        let expected = if place < SHORT { place_of(place) as u8 + 1 } else { 0 };
        assert!(cluster.iter().all(|byte| *byte == expected), "cluster {place}");
    }
    // The tables are in memory now: the owner is told at once.
    for place in 0..SHORT {
        let (owner, bytes) = block_on(pass_down(top.clone(), place * CLUSTER, 2 * CLUSTER));
        let expected = &nodes[place_of(place) as usize];
        assert!(
            std::ptr::addr_eq(Rc::as_ptr(&owner), Rc::as_ptr(expected)),
            "cluster {place}"
        );
        // It looks below for the rest, as far as the short image has it.
        assert_eq!(bytes, CLUSTER * (SHORT - place).min(2), "cluster {place}");
    }
}
