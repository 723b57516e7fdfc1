//! What comes out of a run: a Markdown table for each group of rows, printed and put into its place on a page.
//!
//! On the page a group's table stands between `<!-- bench: NAME -->` and `<!-- end -->`, under a line that names the command and
//! the machine. NAME is what follows `ROWS=` in the command. A run of a whole group replaces it; a run of some rows replaces those.

use super::peers::Peer;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

/// Measured values by row, in the rows' order.
pub type Values = BTreeMap<(usize, String), Vec<f64>>;

/// What is wanted, and what there is so far.
pub struct Report {
    /// A row is measured when its name has this in it.
    only: String,
    page: Option<PathBuf>,
    group: &'static str,
    peer: Option<Peer>,
    rows: Vec<(String, String)>,
}

impl Report {
    /// For the rows that have a text in their names.
    pub fn new(only: String, page: Option<PathBuf>) -> Self {
        Self {
            only,
            page,
            group: "",
            peer: None,
            rows: Vec::new(),
        }
    }

    /// Measures a group, beside a peer or alone. Where the peer is missing it says so, and the rows are Bulkhead's alone and do not
    /// go to the page.
    pub fn group(&mut self, name: &'static str, peer: Option<Peer>, measure: impl FnOnce(&mut Self)) {
        let missing = peer.and_then(Peer::missing);
        self.group = name;
        self.peer = peer.filter(|_| missing.is_none());
        self.rows.clear();
        println!("\n{}\n", self.made_with());
        if let Some(reason) = missing {
            println!("No peer: {reason}.\n");
        }
        println!("{}", self.head());
        measure(self);
        if let (None, Some(page)) = (missing, self.page.clone()) {
            self.write(&page);
        }
    }

    /// Whether a row is wanted.
    pub fn wants(&self, name: &str) -> bool {
        name.contains(&self.only)
    }

    /// Whether any of some rows is.
    pub fn wants_any<S: AsRef<str>>(&self, names: &[S]) -> bool {
        names.iter().any(|name| self.wants(name.as_ref()))
    }

    /// What is beside Bulkhead.
    pub fn peer(&self) -> Option<Peer> {
        self.peer
    }

    /// What Bulkhead and the peer say in turn, in so many pairs of runs after one for warming up.
    pub fn pairs<T>(&self, count: usize, mut run: impl FnMut(Peer) -> T) -> (Vec<T>, Vec<T>) {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for pair in 0..=count {
            let our = run(Peer::Bulkhead);
            let their = self.peer.map(&mut run);
            if pair > 0 {
                ours.push(our);
                theirs.extend(their);
            }
        }
        (ours, theirs)
    }

    /// Adds a row: what one value was in every run of both programs.
    pub fn row(&mut self, name: &str, ours: &[f64], theirs: &[f64]) {
        if !self.wants(name) {
            return;
        }
        let (our, their) = (summary(ours), summary(theirs));
        let ratio = our.zip(their).map_or_else(String::new, |(our, their)| {
            let pairs: Vec<f64> = ours.iter().zip(theirs).map(|(our, their)| our / their).collect();
            let (least, _, most) = summary(&pairs).unwrap_or_default();
            format!("{} ({}–{})", short(our.1 / their.1), short(least), short(most))
        });
        let line = format!("| {name} | {} | {} | {ratio} |", text(our), text(their));
        println!("{line}");
        self.rows.push((name.to_owned(), line));
    }

    /// Adds the rows of many values, of each run.
    pub fn rows(&mut self, (ours, theirs): (Vec<Values>, Vec<Values>)) {
        let merged = |runs: Vec<Values>| {
            let mut all = Values::new();
            for (row, mut values) in runs.into_iter().flatten() {
                all.entry(row).or_default().append(&mut values);
            }
            all
        };
        let (ours, theirs) = (merged(ours), merged(theirs));
        for (name, values) in &ours {
            self.row(&name.1, values, theirs.get(name).map_or(&[], Vec::as_slice));
        }
    }

    fn head(&self) -> String {
        let peer = self.peer.map_or("–", Peer::name);
        format!(
            "| row | Bulkhead min / median / max | {peer} min / median / max | ratio of medians (pair by pair) |\n\
             |---|---|---|---|"
        )
    }

    fn made_with(&self) -> String {
        let peer = self
            .peer
            .map_or_else(String::new, |peer| format!(", {}", peer.version()));
        format!(
            "`make bench ROWS={}{}` on {}{peer}.",
            self.group,
            self.which(),
            machine()
        )
    }

    /// How the command names the peer's program, where it does: then the table has a place of its own.
    fn which(&self) -> String {
        let variable = self.peer.and_then(Peer::named_by);
        variable.map_or_else(String::new, |variable| format!(" {variable}=PATH"))
    }

    /// Puts the group's rows into their place on the page, when they have one.
    fn write(&self, page: &std::path::Path) {
        let text = std::fs::read_to_string(page).expect("reading the page");
        let begin = format!("<!-- bench: {}{} -->\n", self.group, self.which());
        let Some((before, rest)) = text.split_once(&begin) else {
            eprintln!("{}: no place for {}{}", page.display(), self.group, self.which());
            return;
        };
        let (there, after) = rest.split_once("<!-- end -->").expect("the end of the table");
        let mut rows = self.rows.clone();
        if !self.only.is_empty() {
            rows = there.lines().filter_map(kept).collect();
            for (name, line) in &self.rows {
                match rows.iter_mut().find(|(kept, _)| kept == name) {
                    Some(row) => row.1.clone_from(line),
                    None => rows.push((name.clone(), line.clone())),
                }
            }
        }
        let lines: String = rows.iter().map(|(_, line)| format!("{line}\n")).collect();
        let (made_with, head) = (self.made_with(), self.head());
        let text = format!("{before}{begin}{made_with}\n\n{head}\n{lines}<!-- end -->{after}");
        std::fs::write(page, text).expect("writing the page");
    }
}

/// A row of a page's table, with its name.
fn kept(line: &str) -> Option<(String, String)> {
    let name = line.strip_prefix("| ")?.split(" | ").next()?;
    (name != "row").then(|| (name.to_owned(), line.to_owned()))
}

/// The smallest, the middle and the largest of some values.
fn summary(values: &[f64]) -> Option<(f64, f64, f64)> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    Some((*values.first()?, *values.get(values.len() / 2)?, *values.last()?))
}

fn text(summary: Option<(f64, f64, f64)>) -> String {
    match summary {
        // Whole numbers for what is large.
        Some((min, median, max)) if median >= 1000.0 => format!("{min:.0} / {median:.0} / {max:.0}"),
        Some((min, median, max)) => format!("{min:.1} / {median:.1} / {max:.1}"),
        None => "–".into(),
    }
}

/// A ratio with two digits that say something.
fn short(ratio: f64) -> String {
    match ratio {
        ratio if ratio < 0.095 => format!("{ratio:.3}"),
        ratio => format!("{ratio:.2}"),
    }
}

/// Facts about this machine that measurements depend on.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(": ")?.1.to_owned())
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let flags = field("flags").unwrap_or_default();
    let kvm = match flags.split(' ').any(|flag| flag == "vmx" || flag == "svm") {
        true => "KVM",
        false => "KVM without hardware virtualisation",
    };
    let pages = read("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let pages = pages.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned();
    format!(
        "{cpus} processors ({}), {} GiB, Linux {}, {kvm}, `shmem_enabled` {pages}",
        field("model name").unwrap_or_default(),
        kib_of(&read("/proc/meminfo"), "MemTotal:").div_ceil(1 << 20),
        // The release; what follows names a build of it.
        read("/proc/sys/kernel/osrelease")
            .trim()
            .split('-')
            .next()
            .unwrap_or_default(),
    )
}

fn kib_of(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}

/// The first line of what a program says about its version.
pub fn version_of(program: &std::path::Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(text.lines().next()?.to_owned())
}
