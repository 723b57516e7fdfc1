//! `make demo`: Bulkhead's main job, with a real Linux guest, to look at. Runs on this machine if its processor can, else in
//! the lab.

use bulkhead_tests::lab::outer::make_ext4;
use bulkhead_tests::lab::pieces::find_program;
use bulkhead_tests::lab::site::local_folder;
use bulkhead_tests::lab::{Machine, Site, User, machine};
use serde_json::json;
use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// Until the guest is up; it takes seconds on an idle machine.
const BOOT: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(60);

/// What the processes of the machine are allowed to do, as the kernel that runs them says it. One line a process.
const PROCESS_TABLE: &str = r#"
value() { sed -n "s/^$1:[[:space:]]*//p" "$process/status" | cut -f1; }
printf '%-11s %6s %11s %8s %8s %8s %11s %17s %5s %4s %8s\n' \
    process pid uid threads seccomp filters NoNewPrivs CapEff root fds 'private'
supervisor=$(cat PIDFILE)
for process in /proc/[0-9]*; do
    pid=${process#/proc/}
    case $(readlink "$process/exe") in
    */bulkhead) name=launcher; [ "$pid" = "$supervisor" ] && name=supervisor ;;
    */*-proc) name=$(readlink "$process/exe"); name=${name##*/} ;;
    *) continue ;;
    esac
    # Only those of this machine: the supervisor, its child the launcher, and the launcher's children.
    parent=$(value PPid)
    grandparent=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$parent/status")
    case $supervisor in "$pid" | "$parent" | "$grandparent") ;; *) continue ;; esac
    root=$(ls -A "$process/root" 2>/dev/null | wc -l)
    [ "$root" = 0 ] && root=empty || root=host
    private=$(awk '/^Pss:/ { all = $2 } /^Pss_Shmem:/ { shared = $2 } END { print all - shared }' "$process/smaps_rollup")
    printf '%-11s %6s %11s %8s %8s %8s %11s %17s %5s %4s %4s KiB\n' "$name" "$pid" "$(value Uid)" "$(value Threads)" \
        "$(value Seccomp)" "$(value Seccomp_filters)" "$(value NoNewPrivs)" "$(value CapEff)" "$root" \
        "$(ls "$process/fd" | wc -l)" "$private"
done
"#;

fn main() -> ExitCode {
    if let Err(reason) = Site::available() {
        eprintln!("demo: not possible here: {reason}");
        return ExitCode::FAILURE;
    }
    match show() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show() -> Result<(), String> {
    let begun = Instant::now();
    heading("Where it runs");
    println!("  {}", Site::describe());
    let site = Site::start_with(machine::hypervisor)?;
    if let Site::Lab(lab) = &site {
        println!("  The lab is up after {:.1} s: ", lab.boot_time.as_secs_f64());
        println!(
            "  {}",
            lab.run("uname -srm; ls -l /dev/kvm")
                .stdout
                .trim_end()
                .replace('\n', "\n  ")
        );
    }

    heading("A disk: 256 MiB, raw, with an empty ext4 file system made on the host");
    let (_folder, local) = local_folder();
    let image = local.join("disk.img");
    make_ext4(&image, 256 << 20)?;
    let disk = site.path("disk.img");
    site.put(&image, &disk, 0o644)?;

    heading("A machine: two vCPUs, 512 MiB, a stock Debian kernel, that disk");
    let started = Instant::now();
    let builder = Machine::builder(&site, "demo")
        .vcpus(2)
        .disk(&disk)
        .user(User::Root)
        .echo();
    let mut machine = builder.start_paused()?;
    println!("  {}", machine.command.replace(" -", " \\\n      -"));
    println!("  Its processes are up and sealed; the guest has not executed an instruction.");

    heading("Its processes, as /proc shows them");
    let table = site.run(&PROCESS_TABLE.replace("PIDFILE", &machine.pidfile));
    println!("  {}", table.stdout.trim_end().replace('\n', "\n  "));
    println!("  root: what the process sees as /. private: proportional set size without guest RAM.");
    println!("  The launcher's capabilities count in its own user namespace only.");

    heading("QMP: go");
    machine.qmp.command("query-version", json!({}))?;
    machine.qmp.command("query-status", json!({}))?;
    machine.qmp.command("cont", json!({}))?;

    heading("The guest's serial console");
    machine.expect("guest# ", BOOT)?;
    let up = started.elapsed().as_secs_f64();
    for command in [
        "dmesg | grep -E 'Linux version|Hypervisor|Total of|Power Button|Run /init'",
        "guest-irqs",
        "mount -t ext4 /dev/vda /mnt",
        "echo \"written by $(uname -n) on $(nproc) vCPUs\" >/mnt/hello.txt; cat /mnt/hello.txt",
        "guest-disk 16",
        "guest-button &",
    ] {
        machine.console.send(&format!("{command}\n"))?;
        let until = match command {
            "guest-disk 16" => "same checksum",
            "guest-button &" => "waiting at",
            _ => "guest# ",
        };
        machine.expect(until, BOOT)?;
    }
    println!("\n  The shell was there {up:.1} s after the machine was started.");

    heading("QMP: stop and go on, then the power button");
    for command in ["query-cpus-fast", "stop", "query-status", "cont", "system_powerdown"] {
        machine.qmp.command(command, json!({}))?;
    }
    let shutdown = machine.qmp.event("SHUTDOWN", SOON)?;
    if shutdown["data"]["guest"] != json!(true) {
        return Err(format!("the guest did not switch off by itself: {shutdown}"));
    }
    let pidfile = machine.pidfile.clone();
    let end = machine.end(SOON)?;

    heading("Afterwards");
    println!("  bulkhead ended with status {}", end.status);
    let left = site
        .run(&PROCESS_TABLE.replace("PIDFILE", &pidfile))
        .stdout
        .lines()
        .count()
        .saturating_sub(1);
    println!("  processes left: {left}");
    site.get(&disk, &image)?;
    host(&image, "e2fsck", &["-fn"], false)?;
    let text = host(&image, "debugfs", &["-R", "cat /hello.txt"], true)?;
    if end.status != 0 || left != 0 || !text.contains("vCPUs") {
        return Err("that is not how it should end".into());
    }
    println!("\nDone in {:.0} s.", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Runs a tool of the host on the image and shows what it says.
fn host(image: &Path, tool: &str, arguments: &[&str], quiet_errors: bool) -> Result<String, String> {
    println!("  on the host: {tool} {} disk.img", arguments.join(" "));
    let program = find_program(tool).ok_or_else(|| format!("no {tool}"))?;
    let output = Command::new(program)
        .args(arguments)
        .arg(image)
        .output()
        .map_err(|error| format!("{tool}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in text.lines() {
        println!("      {line}");
    }
    if !output.status.success() && !quiet_errors {
        return Err(format!("{tool}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(text)
}

fn heading(text: &str) {
    let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (bold, plain) = if colours { ("\x1b[1;36m", "\x1b[0m") } else { ("", "") };
    println!("\n{bold}== {text}{plain}");
}
