//! The command line: `policy`, `live`, `binary`.

use crate::binary::{self, BinaryError};
use crate::coverage;
use crate::live::{self, Expectation, LiveError, State};
use crate::policy::{Policy, PolicyError, Process, Source, difference, table};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

/// `--help`.
const HELP: &str = "\
Holds Bulkhead against its reviewed policies. Reads the kernel's view of processes, and asks none of them.

Usage: bulkhead audit policy [PROCESS]... [--json] [--policies DIRECTORY]
           how many system calls each process may make, or all its rules; warnings for what weakens a filter
       bulkhead audit policy --difference OLD.json NEW.json [--json]
           what two versions of a policy allow differently; exit status 1 if there is a difference
       bulkhead audit live NAME|PID [--json] [--graph FILE.svg|FILE.dot] [--policies DIRECTORY] [--programs DIRECTORY]
           a running machine against its declaration: programs, installed filters, privileges, capabilities, ids,
           namespaces, limits, root directories, memory, and every descriptor; exit status 1 if anything differs
       bulkhead audit binary [PROCESS]... [--json] [--programs DIRECTORY] [--policies DIRECTORY]
           which system calls the code of each helper can make, beside what its policy allows
       bulkhead audit coverage --record FILE -- COMMAND [ARGUMENT]...
           runs a command, a test for instance, under ptrace, and adds to FILE which calls the processes of machines make
       bulkhead audit coverage FILE... [--json] [--policies DIRECTORY]
           which rules those runs exercised, and which they never needed

PROCESS is qmp-proc, dump-proc, vcpu-proc, block-proc, supervisor, opener, warden or launcher.
--policies DIRECTORY takes the policies from files there; otherwise they are those that this program was built with.
--programs DIRECTORY says where the installed programs are; otherwise they are beside the running bulkhead (live) or beside
this program (binary).
Exit status: 0 as it should be, 1 a difference was found, 2 it could not be looked.
";

/// Why an audit could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The command line.
    #[error("{0}; --help says more")]
    Usage(String),
    /// A policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A machine.
    #[error(transparent)]
    Live(#[from] LiveError),
    /// An executable.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// A recording could not be made.
    #[error("tracing {program}: {error}")]
    Tracing {
        /// What was to be run.
        program: String,
        /// Why not.
        error: std::io::Error,
    },
    /// A recording's file.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What happened.
        error: std::io::Error,
    },
    /// Output.
    #[error("writing: {0}")]
    Output(#[from] std::io::Error),
}

/// What all parts take.
#[derive(Debug, Default)]
struct Options {
    words: Vec<String>,
    json: bool,
    source: Source,
    difference: Option<(PathBuf, PathBuf)>,
    programs: Option<PathBuf>,
    graph: Option<PathBuf>,
    record: Option<PathBuf>,
}

fn options(arguments: impl Iterator<Item = OsString>) -> Result<Options, AuditError> {
    let mut options = Options::default();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy().into_owned();
        let mut value = || {
            let missing = || AuditError::Usage(format!("{text} takes a value"));
            arguments.next().map(PathBuf::from).ok_or_else(missing)
        };
        match text.as_str() {
            "--json" => options.json = true,
            "--policies" => options.source = Source::Directory(value()?),
            "--programs" => options.programs = Some(value()?),
            "--graph" => options.graph = Some(value()?),
            "--record" => options.record = Some(value()?),
            "--" => {
                let rest = arguments.by_ref().map(|word| word.to_string_lossy().into_owned());
                options.words.extend(rest);
            }
            "--difference" => options.difference = Some((value()?, value()?)),
            other if other.starts_with('-') => {
                return Err(AuditError::Usage(format!("there is no option {other}")));
            }
            _ => options.words.push(text),
        }
    }
    Ok(options)
}

/// Carries out what the arguments say; whether all is as it should be.
///
/// # Errors
/// [`AuditError`].
pub fn run(arguments: impl Iterator<Item = OsString>, out: &mut dyn Write) -> Result<bool, AuditError> {
    let mut arguments = arguments.peekable();
    let part = arguments.next().map(|part| part.to_string_lossy().into_owned());
    match part.as_deref() {
        Some("policy") => policy(&options(arguments)?, out),
        Some("live") => live(options(arguments)?, out),
        Some("binary") => binary(&options(arguments)?, out),
        Some("coverage") => coverage(&options(arguments)?, out),
        Some("--help" | "-help" | "-h" | "help") => {
            out.write_all(HELP.as_bytes())?;
            Ok(true)
        }
        Some(other) => Err(AuditError::Usage(format!("there is no audit {other}"))),
        None => Err(AuditError::Usage("audit what?".into())),
    }
}

/// The processes that the words name; all when there is none.
fn processes(words: &[String]) -> Result<Vec<Process>, AuditError> {
    if words.is_empty() {
        return Ok(Process::ALL.to_vec());
    }
    words
        .iter()
        .map(|word| Process::of_name(word).ok_or_else(|| AuditError::Usage(format!("{word} is no process"))))
        .collect()
}

fn policy(options: &Options, out: &mut dyn Write) -> Result<bool, AuditError> {
    if let Some((old, new)) = &options.difference {
        return policy_difference(old, new, options.json, out);
    }
    let policies = processes(&options.words)?
        .into_iter()
        .map(|process| options.source.read(process))
        .collect::<Result<Vec<_>, _>>()?;
    if options.json {
        let values = policies.iter().map(table::json).collect::<Result<Vec<_>, _>>()?;
        writeln!(out, "{:#}", serde_json::Value::from(values))?;
    } else if options.words.is_empty() {
        writeln!(out, "{}", table::summary(&options.source)?)?;
        for policy in &policies {
            let warnings = crate::policy::weakness::find(policy)?;
            out.write_all(table::warnings_text(&policy.name, &warnings).as_bytes())?;
        }
    } else {
        for policy in &policies {
            out.write_all(table::rules(policy)?.as_bytes())?;
        }
    }
    Ok(true)
}

fn policy_difference(old: &Path, new: &Path, json: bool, out: &mut dyn Write) -> Result<bool, AuditError> {
    let found = difference::between(&Policy::of_file(old)?, &Policy::of_file(new)?);
    if json {
        writeln!(out, "{:#}", serde_json::json!(found))?;
    } else if found.is_empty() {
        writeln!(out, "no difference")?;
    } else {
        for difference in &found {
            writeln!(out, "{difference}")?;
        }
    }
    Ok(found.is_empty())
}

fn live(options: Options, out: &mut dyn Write) -> Result<bool, AuditError> {
    let [name] = options.words.as_slice() else {
        return Err(AuditError::Usage(
            "audit live takes the name or a process id of one machine".into(),
        ));
    };
    let expectation = Expectation {
        source: options.source,
        programs: options.programs,
    };
    let look = live::look(name, &expectation)?;
    if let Some(path) = &options.graph {
        let drawn = match path.extension().and_then(|extension| extension.to_str()) {
            Some("dot") => live::graph::dot(&look.machine),
            Some("svg") => live::graph::svg(&look.machine),
            _ => {
                return Err(AuditError::Usage(
                    "--graph takes a file that ends in .svg or .dot".into(),
                ));
            }
        };
        std::fs::write(path, drawn)?;
    }
    let [differs, unknown] = [State::Differs, State::NotCheckable].map(|state| look.count(state));
    if options.json {
        let processes: Vec<_> = look
            .machine
            .processes
            .iter()
            .map(|member| {
                serde_json::json!({
                    "process": member.name(),
                    "pid": member.seen.pid,
                    "descriptors": member.seen.descriptors.as_ref().ok(),
                })
            })
            .collect();
        let value = serde_json::json!({
            "rows": look.rows,
            "processes": processes,
            "differences": differs,
            "not-checkable": unknown,
        });
        writeln!(out, "{value:#}")?;
    } else {
        for row in &look.rows {
            writeln!(out, "{row}")?;
        }
        writeln!(
            out,
            "\n{} equal, {unknown} not checkable, {} layers missing, {differs} differ",
            look.count(State::Equal),
            look.count(State::Missing)
        )?;
    }
    Ok(differs == 0)
}

fn coverage(options: &Options, out: &mut dyn Write) -> Result<bool, AuditError> {
    let file = |path: &Path| {
        let path = path.to_path_buf();
        move |error| AuditError::File { path, error }
    };
    let read = |path: &Path, into: &mut coverage::Recording| {
        let text = std::fs::read_to_string(path).map_err(file(path))?;
        coverage::read(&text, into).map_err(|error| file(path)(error.into()))
    };
    let mut recording = coverage::Recording::new();
    let Some((first, rest)) = options.words.split_first() else {
        return Err(AuditError::Usage("coverage of what?".into()));
    };
    if let Some(path) = &options.record {
        if path.exists() {
            read(path, &mut recording)?;
        }
        let (status, made) = coverage::record::run(first, rest).map_err(|error| AuditError::Tracing {
            program: first.clone(),
            error,
        })?;
        for (seen, count) in made {
            *recording.entry(seen).or_default() += count;
        }
        std::fs::write(path, coverage::write(&recording)).map_err(file(path))?;
        return Ok(status == 0);
    }
    for path in options.words.iter().map(Path::new) {
        read(path, &mut recording)?;
    }
    let (rows, refused) = coverage::rows(&options.source, &Process::ALL, &recording)?;
    if options.json {
        let value = serde_json::json!({"rules": rows, "calls-no-rule-allows": refused});
        writeln!(out, "{value:#}")?;
    } else {
        out.write_all(coverage::text(&rows, refused).as_bytes())?;
    }
    Ok(true)
}

fn binary(options: &Options, out: &mut dyn Write) -> Result<bool, AuditError> {
    let beside = || std::env::current_exe().unwrap_or_default().with_file_name("");
    let directory = options.programs.clone().unwrap_or_else(beside);
    let named = processes(&options.words)?;
    if let Some(process) = named
        .iter()
        .find(|process| !process.is_helper() && !options.words.is_empty())
    {
        return Err(AuditError::Usage(format!(
            "{} has no program of its own: it is part of bulkhead",
            process.name()
        )));
    }
    let mut found = Vec::new();
    for process in named.into_iter().filter(|process| process.is_helper()) {
        let reach = binary::reach(&directory.join(process.name()))?;
        found.push(binary::compare(&options.source.read(process)?, &reach));
    }
    if options.json {
        writeln!(out, "{:#}", serde_json::json!(found))?;
    } else {
        for comparison in &found {
            writeln!(out, "{comparison}")?;
        }
    }
    Ok(true)
}
