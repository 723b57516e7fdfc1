use super::*;
use ipc::caps::GuestMemRo;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A guest of 64 MiB without translation: physical addresses are the kernel's.
const RAM_BYTES: u64 = 64 << 20;
const SECTION_BITS: u64 = 24;
const ROOTS: u64 = 0x1000;
const ROOT: u64 = 0x2000;
const MAP: u64 = 0x10_0000;
const PAGE_STRUCT: u64 = 64;

struct Guest {
    memfd: File,
}

impl Guest {
    fn new() -> Self {
        let memfd = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
        memfd.set_len(RAM_BYTES).unwrap();
        let guest = Self { memfd };
        guest.put(ROOTS, &ROOT.to_le_bytes());
        for section in 0..RAM_BYTES >> SECTION_BITS {
            guest.put(ROOT + section * 16, &(MAP | 3).to_le_bytes());
        }
        guest
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memfd.write_all_at(bytes, at).unwrap();
    }

    /// A field of a page's struct.
    fn field(&self, page: u64, at: u64, bytes: &[u8]) {
        self.put(MAP + page * PAGE_STRUCT + at, bytes);
    }

    fn memory(&self) -> GuestMemory {
        GuestMemory::new(GuestMemRo::new(self.memfd.try_clone().unwrap().into()), RAM_BYTES).unwrap()
    }

    fn left_out(&self, note: &Note, exclude: Exclude) -> Result<Vec<u64>, ExcludeError> {
        // Without paging addresses are physical.
        let kept = kept(&self.memory(), Some(note), &[Paging::default()], &exclude)?;
        let pages = RAM_BYTES / PAGE_BYTES;
        let out: Vec<u64> = (0..pages).filter(|page| !kept.has(*page)).collect();
        assert_eq!(kept.pages() + out.len() as u64, pages);
        assert_eq!(kept.rank(pages), kept.pages());
        for page in out.iter().copied().take(50) {
            assert_eq!(kept.rank(page), (0..page).filter(|page| kept.has(*page)).count() as u64);
        }
        Ok(out)
    }
}

fn note(without: &str) -> Note {
    let text = "SIZE(page)=64\nOFFSET(page.flags)=0\nOFFSET(page._refcount)=52\nOFFSET(page.mapping)=24\n\
        OFFSET(page._mapcount)=48\nOFFSET(page.private)=40\nOFFSET(page.compound_head)=8\nOFFSET(page.compound_order)=17\n\
        OFFSET(page.compound_dtor)=16\nNUMBER(PG_head_mask)=65536\nNUMBER(PG_lru)=4\nNUMBER(PG_private)=13\n\
        NUMBER(PG_swapcache)=10\nNUMBER(PG_swapbacked)=19\nNUMBER(PG_slab)=9\nNUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)=-129\n\
        NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)=-257\nNUMBER(HUGETLB_PAGE_DTOR)=2\nSYMBOL(mem_section)=1000\n\
        LENGTH(mem_section)=1\nSIZE(mem_section)=16\nOFFSET(mem_section.section_mem_map)=0\nNUMBER(SECTION_SIZE_BITS)=24\n";
    let lines = text
        .lines()
        .filter(|line| without.is_empty() || !line.starts_with(without));
    Note {
        address: 0,
        text: lines.flat_map(|line| format!("{line}\n").into_bytes()).collect(),
    }
}

fn only(kind: &str) -> Exclude {
    Exclude {
        free: kind == "free",
        cache: kind == "cache",
        user: kind == "user",
        zero: false,
    }
}

/// One page or more of every kind.
fn sample() -> Guest {
    let guest = Guest::new();
    // Free: 4 pages in one piece; one that looks like it and is used; one that is offline.
    for page in [100, 200] {
        guest.field(page, 48, &(-129_i32).to_le_bytes());
        guest.field(page, 40, &2_u64.to_le_bytes());
    }
    guest.field(200, 52, &1_u32.to_le_bytes());
    guest.field(300, 48, &(-257_i32).to_le_bytes());
    // Contents of files: one page, one with private data, a folio of 8 with its tails.
    guest.field(400, 0, &(1_u64 << 4).to_le_bytes());
    guest.field(401, 0, &(1_u64 << 4 | 1 << 13).to_le_bytes());
    guest.field(408, 0, &(1_u64 << 4 | 1 << 16).to_le_bytes());
    guest.field(409, 17, &[3]);
    for tail in 409..416 {
        guest.field(tail, 8, &(MAP + 408 * PAGE_STRUCT + 1).to_le_bytes()[..1]);
    }
    // Memory of processes: on a list, and not; a huge page; not a slab, whose field means something else.
    guest.field(500, 24, &1_u64.to_le_bytes());
    guest.field(500, 0, &(1_u64 << 4).to_le_bytes());
    guest.field(501, 24, &1_u64.to_le_bytes());
    guest.field(502, 24, &1_u64.to_le_bytes());
    guest.field(502, 0, &(1_u64 << 9).to_le_bytes());
    guest.field(1024, 0, &(1_u64 << 16).to_le_bytes());
    guest.field(1025, 16, &[2, 9]);
    guest
}

#[test]
fn kinds_are_told_apart_as_the_kernel_marks_them() {
    let guest = sample();
    let cases: [(&str, Vec<u64>); 3] = [
        ("free", [100, 101, 102, 103, 300].into()),
        ("cache", [400, 401].into_iter().chain(408..416).collect()),
        ("user", [500, 501].into_iter().chain(1024..1536).collect()),
    ];
    for (kind, expected) in cases {
        assert_eq!(guest.left_out(&note(""), only(kind)).unwrap(), expected, "{kind}");
    }
}

#[test]
fn without_a_note_nothing_can_be_told() {
    let blind = super::kept(&sample().memory(), None, &[], &only("free")).unwrap_err();
    assert_eq!(
        blind.to_string(),
        "dump: 'exclude' needs a Linux guest: this one has no VMCOREINFO"
    );
}

#[test]
fn a_note_that_lacks_something_is_refused() {
    let guest = sample();
    for key in [
        "SIZE(page)",
        "OFFSET(page.mapping)",
        "NUMBER(PG_lru)",
        "SYMBOL(mem_section)",
        "NUMBER(SECTION_SIZE_BITS)",
    ] {
        let error = guest.left_out(&note(key), only("free")).unwrap_err();
        assert!(matches!(error, ExcludeError::Lacks(_)), "{key}: {error}");
    }
    // Where nothing is.
    let mut lost = note("SYMBOL(mem_section)");
    lost.text.extend(b"SYMBOL(mem_section)=ffffffff00000000\n");
    assert!(matches!(
        guest.left_out(&lost, only("free")),
        Err(ExcludeError::NotThere)
    ));
}

/// All bytes that decide anything, at random: it ends, soon, and reads nothing but RAM (which the memory checks).
#[test]
fn nothing_that_a_guest_writes_leads_out_of_ram() {
    let all = Exclude {
        free: true,
        cache: true,
        user: true,
        zero: true,
    };
    let mut state = 1_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..20 {
        let guest = Guest::new();
        let noise: Vec<u8> = (0..(RAM_BYTES / PAGE_BYTES) * PAGE_STRUCT / 8)
            .flat_map(|_| random().to_le_bytes())
            .collect();
        guest.put(MAP, &noise);
        if round % 2 == 1 {
            for section in 0..4 {
                guest.put(ROOT + section * 16, &(random() >> (round * 3) | 2).to_le_bytes());
            }
        }
        let mut note = note("LENGTH(mem_section)");
        note.text
            .extend(format!("LENGTH(mem_section)={}\n", random() as i64).bytes());
        let _ = guest.left_out(&note, all);
        // Orders without end: every page claims all that follow.
        for page in 0..RAM_BYTES / PAGE_BYTES {
            guest.field(page, 40, &u64::MAX.to_le_bytes());
        }
        let _ = guest.left_out(&note, all);
    }
}
