//! The process dies at a random moment and the host does not: whatever was answered is there for the next process, flushed or
//! not, and whatever it does with the image leaves that sound. Requests at random on an image in memory; the image and the
//! ledger, as they are at some moment, are all that the next process gets.

mod qcow2_common;

use block_proc::executor::Executor;
use block_proc::ledger::Ledger;
use block_proc::node::Node;
use block_proc::node::qcow2::{Children, Qcow2Node};
use ipc::graph::NodeId;
use ipc::inflight::LEDGER_BYTES;
use ipc::memory::GuestRam;
use qcow2_common::*;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use vm_memory::{Bytes, GuestAddress};

const SECTOR: u64 = 512;
const NODE: NodeId = NodeId(3);

fn ledger_memory() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), LEDGER_BYTES as usize)]).unwrap()
}

/// What is on the disk, as far as the guest can know.
#[derive(Clone, Default)]
struct Model {
    bytes: Vec<u8>,
    /// Requests under way: where, and what they write, if that is known.
    under_way: BTreeMap<u64, (Range<usize>, Option<Vec<u8>>)>,
}

impl Model {
    /// Takes what there is after a death for what there is from now on. Each sector is as it was answered, or as a request
    /// under way makes it.
    fn settle(&mut self, found: &[u8], what: &str) {
        let sector = SECTOR as usize;
        for at in (0..found.len()).step_by(sector) {
            let place = at..at + sector;
            let mut under_way = self.under_way.values().filter(|(range, _)| range.contains(&at));
            let is_new = under_way.any(|(range, data)| match data {
                Some(data) => data[at - range.start..][..sector] == found[place.clone()],
                None => true,
            });
            let is_old = self.bytes[place.clone()] == found[place.clone()];
            assert!(is_old || is_new, "{what}: sector {} is lost", at / sector);
        }
        self.bytes.copy_from_slice(found);
        self.under_way.clear();
    }
}

/// What survives.
#[derive(Default)]
struct Remains {
    image: Vec<u8>,
    ledger: Vec<u8>,
    model: Model,
}

struct Process {
    node: Rc<Qcow2Node>,
    model: Rc<RefCell<Model>>,
    next: Cell<u64>,
}

impl Process {
    async fn request(self: Rc<Self>, mut random: Random, requests: u64, own: Range<u64>) {
        let cluster = 1_u64 << self.node.header().cluster_bits;
        for _ in 0..requests {
            let largest = [SECTOR, cluster, 3 * cluster][random.below(3) as usize];
            let start = own.start + random.below((own.end - own.start) / SECTOR) * SECTOR;
            let length = ((random.below(largest / SECTOR) + 1) * SECTOR).min(own.end - start);
            let places = start as usize..(start + length) as usize;
            let number = self.next.replace(self.next.get() + 1);
            let begin = |data: Option<Vec<u8>>| {
                let under_way = &mut self.model.borrow_mut().under_way;
                under_way.insert(number, (places.clone(), data));
            };
            let end = |data: &[u8]| {
                let mut model = self.model.borrow_mut();
                model.under_way.remove(&number);
                model.bytes[places.clone()].copy_from_slice(data);
            };
            match random.below(14) {
                0..8 => {
                    let data: Vec<u8> = (0..length).map(|at| (number * 7 + at / SECTOR) as u8 | 1).collect();
                    begin(Some(data.clone()));
                    let durable = random.below(16) == 0;
                    self.node.write(start, segments(&data), durable).await.unwrap();
                    end(&data);
                }
                8..10 => {
                    let zeroes = vec![0; length as usize];
                    begin(Some(zeroes.clone()));
                    let unmap = random.below(2) == 0;
                    self.node.write_zeroes(start, length, unmap).await.unwrap();
                    end(&zeroes);
                }
                10..12 => {
                    begin(None);
                    self.node.discard(start, length).await.unwrap();
                    // Reading tells what it has become.
                    let now = read(&*self.node, start, length as usize).await.unwrap();
                    end(&now);
                }
                12 => self.node.flush().await.unwrap(),
                _ => {
                    let now = read(&*self.node, start, length as usize).await.unwrap();
                    assert!(now == self.model.borrow().bytes[places], "a read before the death");
                }
            }
            turns(random.below(3)).await;
        }
    }
}

struct Case {
    options: &'static str,
    bytes: u64,
    cache_bytes: u64,
    with_backing: bool,
    requests: u64,
}

fn run(case: &Case, seed: u64) {
    let what = format!("{}, seed {seed}", case.options);
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(seed);
    let mut options = case.options.to_owned();
    let base = case.with_backing.then(|| {
        let data: Vec<u8> = (0..case.bytes / 2 + SECTOR)
            .map(|at| (at / SECTOR % 251 + 1) as u8)
            .collect();
        std::fs::write(folder.path().join("base"), &data).unwrap();
        options += &format!(",backing_file={},backing_fmt=raw", folder.path().join("base").display());
        data
    });
    let mut model = Model {
        bytes: vec![0; case.bytes as usize],
        ..Model::default()
    };
    if let Some(base) = &base {
        model.bytes[..base.len()].copy_from_slice(base);
    }
    let mut remains = Remains {
        image: create(folder.path(), &options, case.bytes),
        ledger: vec![0; LEDGER_BYTES as usize],
        model,
    };
    for life in 0..5 {
        let child = Memory::new(remains.image, seed + life);
        child.cache_bytes.set(case.cache_bytes);
        let memory = ledger_memory();
        memory.write_slice(&remains.ledger, GuestAddress(0)).unwrap();
        let children = Children {
            account: Some(Ledger::new(memory.clone(), LEDGER_BYTES).unwrap().account(NODE)),
            ..Children::over(base.clone().map(|base| Memory::new(base, seed) as Rc<dyn Node>))
        };
        let node = open_children(&child, qcow2_common::options(&child), children);
        let node = node.unwrap_or_else(|error| panic!("{what}, life {life}: {error}"));
        remains.model.settle(&content(&node), &format!("{what}, life {life}"));
        let process = Rc::new(Process {
            node: node.clone(),
            model: Rc::new(RefCell::new(remains.model)),
            next: Cell::new(life << 32),
        });
        // Each has a part of the disk for itself; they meet in clusters.
        let part = case.bytes / 6 / SECTOR * SECTOR;
        let mut tasks: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        for number in 0..6 {
            let random = Random::new(seed * 1000 + life * 10 + number);
            let own = number * part..(number + 1) * part;
            tasks.push(Box::pin(process.clone().request(random, case.requests, own)));
        }
        let dead = Rc::new(RefCell::new(None));
        let (grave, model, image) = (dead.clone(), process.model.clone(), child.clone());
        let moment = random.below(case.requests * 40);
        tasks.push(Box::pin(async move {
            turns(moment).await;
            let mut ledger = vec![0; LEDGER_BYTES as usize];
            memory.read_slice(&mut ledger, GuestAddress(0)).unwrap();
            *grave.borrow_mut() = Some(Remains {
                image: image.bytes.borrow().clone(),
                ledger,
                model: model.borrow().clone(),
            });
        }));
        let (mut executor, mut finished, count) = (Executor::default(), Vec::new(), tasks.len());
        tasks.into_iter().for_each(|task| executor.spawn(task));
        executor.run(&mut finished);
        assert_eq!(finished.len(), count, "{what}: requests wait for each other");
        remains = dead.take().expect("the moment has come");
    }
    // The last one closes it: now it is all in the image.
    let child = Memory::new(remains.image, seed);
    let memory = ledger_memory();
    memory.write_slice(&remains.ledger, GuestAddress(0)).unwrap();
    let children = Children {
        account: Some(Ledger::new(memory.clone(), LEDGER_BYTES).unwrap().account(NODE)),
        ..Children::over(base.map(|base| Memory::new(base, seed) as Rc<dyn Node>))
    };
    let node = open_children(&child, qcow2_common::options(&child), children).unwrap();
    remains.model.settle(&content(&node), &what);
    block_on(async move { node.flush().await.unwrap() });
    assert!(
        Ledger::new(memory, LEDGER_BYTES)
            .unwrap()
            .account(NODE)
            .left()
            .is_empty(),
        "{what}"
    );
    let image = save(&child, folder.path().join("image.qcow2"));
    let (code, said) = check(&image);
    // What nobody refers to any more may still be counted.
    assert!(code == 0 || code == 3, "{what}: {said}");
    let raw = folder.path().join("model.raw");
    std::fs::write(&raw, &remains.model.bytes).unwrap();
    let (image, raw) = (image.to_str().unwrap(), raw.to_str().unwrap());
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", image, raw]);
}

#[test]
fn what_was_answered_outlives_the_process() {
    let case = |options, bytes, with_backing| Case {
        options,
        bytes,
        cache_bytes: 4 << 20,
        with_backing,
        requests: 60,
    };
    let cases = [
        case("cluster_size=512", 300 << 10, false),
        case("cluster_size=512,refcount_bits=1", 300 << 10, true),
        case("cluster_size=4096", 2 << 20, false),
        case("cluster_size=4096,compat=0.10", 2 << 20, true),
        case("cluster_size=16384,extended_l2=on", 4 << 20, true),
        case("cluster_size=65536", 16 << 20, false),
        Case {
            // Commits all the time.
            cache_bytes: 4 << 10,
            ..case("cluster_size=512", 300 << 10, false)
        },
    ];
    for (number, case) in (0..).zip(&cases) {
        (0..5).for_each(|seed| run(case, number * 100 + seed));
    }
}
