//! The vCPUs: `-cpu` and `-smp`.

use super::Invocation;
use super::draft::Draft;
use super::error::{UsageError, quote};
use super::given::{Given, switch};
use super::keyval::{Keys, Pairs, number, only};
use crate::config::Topology;
use ipc::vcpu::{CpuFeature, MAX_VCPUS};
use std::ffi::OsStr;

/// `-cpu` models. Both give the host's CPU.
pub const CPUS: &[(&str, &str)] = &[
    ("host", "the host's CPU, all features that KVM can give"),
    ("max", "the same as host"),
];

/// Properties of QEMU's CPUs that are no features, with the value that is so anyway.
const PROPERTIES: &[(&str, &[bool])] = &[
    ("check", &[true, false]),
    ("migratable", &[true, false]),
    ("host-phys-bits", &[true]),
];

/// `-smp`.
pub(super) static SMP_KEYS: Keys = Keys {
    implied: Some("cpus"),
    list: None,
    keys: &[
        number("cpus"),
        number("sockets"),
        number("cores"),
        number("threads"),
        number("maxcpus"),
        only("dies", &["1"], "a socket is one die"),
        only("clusters", &["1"], "there are no clusters of cores"),
        only("modules", &["1"], "there are no modules of cores"),
        only("books", &["1"], "there are no books on x86"),
        only("drawers", &["1"], "there are no drawers on x86"),
    ],
};

/// `-cpu host,+feature,-feature,feature=on|off,feature`.
pub(super) fn cpu(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let mut pieces = given.text()?.split(',');
    let model = pieces.next().unwrap_or_default();
    if model == "help" || model == "?" {
        draft.answer = Some(Invocation::ListCpus);
        return Ok(());
    }
    let models = || CPUS.iter().map(|(name, _)| *name);
    if !models().any(|name| name == model) {
        let given = piece_of(given, model);
        return Err(
            given.refuse("there is no such CPU model: the guest gets the host's CPU, host (or its other name, max)")
        );
    }
    let mut features: Vec<CpuFeature> = Vec::new();
    for piece in pieces.filter(|piece| !piece.is_empty()) {
        let given = piece_of(given, piece);
        let (name, on) = feature(&given, piece)?;
        if let Some((_, values)) = PROPERTIES.iter().find(|(property, _)| *property == name) {
            if !values.contains(&on) {
                return Err(given.refuse(format!("{name} cannot be switched off")));
            }
            continue;
        }
        match features.iter().find(|feature| feature.name == name) {
            Some(earlier) if earlier.on != on => {
                return Err(given.refuse(format!("{name} is switched both on and off")));
            }
            Some(_) => {}
            None => features.push(CpuFeature { name, on }),
        }
    }
    draft.cpu_features = features;
    Ok(())
}

fn piece_of(whole: &Given, piece: &str) -> Given {
    let shown = if piece.is_empty() {
        "''".to_owned()
    } else {
        quote(OsStr::new(piece))
    };
    Given {
        option: whole.option.clone(),
        shown,
        value: piece.into(),
    }
}

/// Name (with QEMU's spellings made one: sse4.1, sse4_1, sse4-1) and state.
fn feature(given: &Given, piece: &str) -> Result<(String, bool), UsageError> {
    let (name, on) = if let Some(name) = piece.strip_prefix('+') {
        (name, true)
    } else if let Some(name) = piece.strip_prefix('-') {
        (name, false)
    } else if let Some((name, value)) = piece.split_once('=') {
        let on = switch(OsStr::new(value)).ok_or_else(|| given.refuse("a CPU feature is on or off"))?;
        (name, on)
    } else {
        (piece, true)
    };
    let is_name = name.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.'));
    if !is_name {
        return Err(given.refuse("a CPU feature is written +avx2, -avx2, avx2=on or avx2=off"));
    }
    Ok((name.replace(['_', '.'], "-"), on))
}

/// What `-smp` has said so far. A later `-smp` overrides key by key.
#[derive(Debug, Default)]
pub(super) struct Smp {
    last: Option<Given>,
    cpus: Option<u64>,
    sockets: Option<u64>,
    cores: Option<u64>,
    threads: Option<u64>,
    maxcpus: Option<u64>,
}

pub(super) fn smp(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    let smp = &mut draft.smp;
    smp.last = Some(pairs.whole.clone());
    for (key, field) in [
        ("cpus", &mut smp.cpus),
        ("sockets", &mut smp.sockets),
        ("cores", &mut smp.cores),
        ("threads", &mut smp.threads),
        ("maxcpus", &mut smp.maxcpus),
    ] {
        if let Some(given) = pairs.get(key) {
            let what = if key == "cpus" || key == "maxcpus" {
                "the count of vCPUs"
            } else {
                "this count"
            };
            *field = Some(given.number(what, 1..=u64::from(MAX_VCPUS))?);
        }
    }
    Ok(())
}

impl Smp {
    /// Fills in what was not said. As in QEMU: of the counts that are missing, cores take what is left over, then
    /// sockets, then threads; the others are 1.
    pub(super) fn topology(&self) -> Result<Topology, UsageError> {
        let Some(given) = &self.last else {
            return Ok(Topology {
                vcpus: 1,
                sockets: 1,
                cores: 1,
                threads: 1,
            });
        };
        let (mut sockets, mut cores, mut threads) = (self.sockets, self.cores, self.threads);
        let wanted = self.maxcpus.or(self.cpus);
        if let Some(wanted) = wanted {
            let left_over = |one: Option<u64>, other: Option<u64>| wanted / (one.unwrap_or(1) * other.unwrap_or(1));
            if cores.is_none() {
                cores = Some(left_over(sockets, threads));
            } else if sockets.is_none() {
                sockets = Some(left_over(cores, threads));
            } else if threads.is_none() {
                threads = Some(left_over(sockets, cores));
            }
        }
        let (sockets, cores, threads) = (sockets.unwrap_or(1), cores.unwrap_or(1), threads.unwrap_or(1));
        let product = sockets * cores * threads;
        let total = wanted.unwrap_or(product);
        if let Some(cpus) = self.cpus.filter(|cpus| *cpus != total) {
            let problem = format!("vCPUs cannot be added to a running machine: leave maxcpus away or make it {cpus}");
            return Err(given.refuse(problem));
        }
        if product != total {
            let problem = format!(
                "{total} vCPUs cannot be shared out: sockets ({sockets}) × cores ({cores}) × threads ({threads}) must be {total}"
            );
            return Err(given.refuse(problem));
        }
        let narrow = |count: u64| {
            u16::try_from(count)
                .ok()
                .filter(|count| *count <= MAX_VCPUS)
                .ok_or_else(|| given.refuse(format!("{count} vCPUs: a machine has at most {MAX_VCPUS}")))
        };
        Ok(Topology {
            vcpus: narrow(total)?,
            sockets: narrow(sockets)?,
            cores: narrow(cores)?,
            threads: narrow(threads)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(text: &str) -> Result<(u16, u16, u16, u16), String> {
        let mut draft = Draft::default();
        let whole = Given::whole("-smp", text.into());
        Pairs::parse(&whole, &whole.value, &SMP_KEYS)
            .and_then(|pairs| smp(&mut draft, &pairs))
            .and_then(|()| draft.smp.topology())
            .map(|t| (t.vcpus, t.sockets, t.cores, t.threads))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn missing_counts_are_filled_in_as_qemu_does() {
        for (text, expected) in [
            ("4", (4, 1, 4, 1)),
            ("cpus=4", (4, 1, 4, 1)),
            ("6,threads=2", (6, 1, 3, 2)),
            ("8,sockets=2", (8, 2, 4, 1)),
            ("8,sockets=2,threads=2", (8, 2, 2, 2)),
            ("8,cores=4", (8, 2, 4, 1)),
            ("8,cores=2,threads=2", (8, 2, 2, 2)),
            ("8,sockets=2,cores=2", (8, 2, 2, 2)),
            ("8,sockets=1,cores=8,threads=1", (8, 1, 8, 1)),
            ("cores=2,threads=2", (4, 1, 2, 2)),
            ("sockets=3", (3, 3, 1, 1)),
            ("maxcpus=4", (4, 1, 4, 1)),
            ("4,maxcpus=4", (4, 1, 4, 1)),
            ("2,dies=1,clusters=1", (2, 1, 2, 1)),
            ("255", (255, 1, 255, 1)),
        ] {
            assert_eq!(topology(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn impossible_counts_are_refused() {
        for (text, expected) in [
            ("0", "-smp 0: the count of vCPUs is a number from 1 to 255"),
            ("300", "-smp 300: the count of vCPUs is a number from 1 to 255"),
            ("-1", "-smp -1: the count of vCPUs is a number from 1 to 255"),
            ("two", "-smp two: the count of vCPUs is a number from 1 to 255"),
            ("2,cores=0", "-smp cores=0: this count is a number from 1 to 255"),
            ("2,dies=2", "-smp dies=2: a socket is one die: only dies=1 is possible"),
            (
                "2,maxcpus=4",
                "-smp 2,maxcpus=4: vCPUs cannot be added to a running machine: leave maxcpus away or make it 2",
            ),
            (
                "5,threads=2",
                "-smp 5,threads=2: 5 vCPUs cannot be shared out: sockets (1) × cores (2) × threads (2) must be 5",
            ),
            (
                "2,sockets=3",
                "-smp 2,sockets=3: 2 vCPUs cannot be shared out: sockets (3) × cores (0) × threads (1) must be 2",
            ),
            (
                "sockets=200,cores=200",
                "-smp sockets=200,cores=200: 40000 vCPUs: a machine has at most 255",
            ),
        ] {
            assert_eq!(topology(text).unwrap_err(), expected);
        }
    }
}
