//! QMP commands: every one of them ends here, as a typed value. Each runs as a sequence of its own, so that a slow one
//! delays nobody.

use super::{
    Vm, bitmaps, block_info, blockdev, chardevs, cpu_model, create, dump, exports, frontends, human, image_header,
    jobs, lifecycle, looking, loss, media, objects, passwords, qom, query, resize, restart, snapshots, throttling,
};
use crate::helper::{Helper, Qmp};
use ipc::action::Actions;
use ipc::caps::ClientGivenFd;
use ipc::qmp::{
    Command, CpuInfoFast, DumpCapability, Event, HelperRole, KvmInfo, NameInfo, QmpCall, QmpError, Return, RunState,
    ShutdownCause, StatusInfo, ToQmp,
};
use ipc::snapshot::{Action, CompletionMode};
use ipc::vcpu::VcpuRequest;
use std::rc::Rc;

/// Carries out a call and sends its one answer.
pub fn handle(vm: &Rc<Vm>, session: Rc<Helper<Qmp>>, call: QmpCall) {
    let QmpCall { call, command, fd } = call;
    if fd.is_some() && !command.takes_fd() {
        return session.kill("it sent a file descriptor with a command that takes none");
    }
    if let Some(result) = answer_at_once(vm, &command) {
        return session.send(ToQmp::Return { call, result });
    }
    let quitting = command == Command::Quit;
    let Some(under_way) = session.begin() else { return };
    let task_vm = Rc::clone(vm);
    vm.executor.spawn(async move {
        let result = carry_out(&task_vm, command, fd).await;
        session.send(ToQmp::Return { call, result });
        drop(under_way);
        if quitting {
            lifecycle::wind_down(task_vm).await;
        }
    });
}

/// The commands that only look.
fn answer_at_once(vm: &Vm, command: &Command) -> Option<Result<Return, QmpError>> {
    Some(Ok(match command {
        Command::QueryStatus => Return::Status(status(vm)),
        Command::QueryName => Return::Name(NameInfo {
            name: vm.config.name.clone(),
        }),
        // vcpu-proc could not have been set up without it.
        Command::QueryKvm => Return::Kvm(KvmInfo {
            enabled: vm.config.guest.is_some(),
            present: true,
        }),
        Command::QueryCpusFast => Return::Cpus(cpus(vm)),
        Command::QueryDump => Return::Dump(vm.dump.report()),
        Command::QueryDumpGuestMemoryCapability => Return::DumpCapability(DumpCapability {
            formats: dump::FORMATS.to_vec(),
        }),
        Command::QueryFdsets => Return::Fdsets(vm.fds.borrow().list()),
        Command::QueryChardev => Return::Chardevs(chardevs::list(vm)),
        Command::QueryChardevBackends => Return::ChardevBackends(chardevs::backends()),
        _ => return query::answer(vm, command).or_else(|| qom::answer(vm, command)),
    }))
}

async fn carry_out(vm: &Rc<Vm>, command: Command, fd: Option<ClientGivenFd>) -> Result<Return, QmpError> {
    match command {
        Command::Stop => lifecycle::stop(vm).await?,
        Command::Cont => lifecycle::cont(vm).await?,
        Command::SystemReset => {
            loss::check_can_run(vm)?;
            // As in QEMU the command returns when the reset is requested; the RESET event tells that it is done.
            vm.executor.spawn(lifecycle::reset(
                Rc::clone(vm),
                false,
                ShutdownCause::HostQmpSystemReset,
            ));
        }
        Command::SystemPowerdown => {
            loss::check_can_run(vm)?;
            vm.emit(Event::Powerdown);
            let pressed = match vm.vcpu() {
                Ok(vcpu) => vcpu.ask(VcpuRequest::PowerButton).await.map(drop),
                Err(error) => Err(error),
            };
            pressed.map_err(|error| QmpError::generic(error.to_string()))?;
        }
        Command::Quit => vm.emit(Event::Shutdown {
            guest: false,
            reason: ShutdownCause::HostQmpQuit,
        }),
        Command::DumpGuestMemory {
            paging,
            protocol,
            detach,
            begin,
            length,
            format,
            compression,
            exclude,
            live,
        } => {
            let arguments = dump::Arguments {
                paging,
                protocol,
                begin,
                length,
                format,
                compression,
                exclude: dump::exclude(&exclude.unwrap_or_default()),
                live: live.unwrap_or(false),
            };
            dump::write(vm, &arguments, detach.unwrap_or(false)).await?;
        }
        Command::InjectNmi => inject_nmi(vm).await?,
        Command::SetAction {
            reboot,
            shutdown,
            panic,
            watchdog,
            helper_loss,
        } => {
            let now = vm.actions.get();
            vm.actions.set(Actions {
                reboot: reboot.unwrap_or(now.reboot),
                shutdown: shutdown.unwrap_or(now.shutdown),
                panic: panic.unwrap_or(now.panic),
                watchdog: watchdog.unwrap_or(now.watchdog),
                helper_loss: helper_loss.unwrap_or(now.helper_loss),
            });
        }
        Command::GetFd { fdname } => vm.fds.borrow_mut().name(fdname, fd)?,
        Command::CloseFd { fdname } => vm.fds.borrow_mut().close(fdname)?,
        Command::AddFd { fdset_id, opaque } => {
            return Ok(Return::AddedFd(vm.fds.borrow_mut().add(fd, fdset_id, opaque)?));
        }
        Command::ObjectAdd(object) => objects::add(vm, object).await?,
        Command::ObjectDel { id } => objects::delete(vm, &id).await?,
        Command::QomSet { path, property, value } => qom::set(vm, &path, &property, &value).await?,
        Command::MemSave {
            val,
            size,
            filename,
            cpu_index,
        } => looking::save(vm, Some(cpu_index), val, size, &filename).await?,
        Command::PmemSave { val, size, filename } => looking::save(vm, None, val, size, &filename).await?,
        Command::QueryCpuModelExpansion { kind, model } => {
            return cpu_model::expand(vm, kind, model).await.map(Return::CpuModelExpansion);
        }
        Command::HumanMonitorCommand { command, cpu_index } => {
            return human::carry_out(vm, command, cpu_index).await.map(Return::Human);
        }
        Command::RemoveFd { fdset_id, fd } => vm.fds.borrow_mut().remove(fdset_id, fd)?,
        Command::ChardevAdd { id, backend } => return Ok(Return::AddedChardev(chardevs::add(vm, id, backend).await?)),
        Command::ChardevChange { id, backend } => {
            return Ok(Return::AddedChardev(chardevs::change(vm, id, backend).await?));
        }
        Command::ChardevRemove { id } => vm.chardevs.remove(id)?,
        Command::RingbufWrite { device, data, format } => vm.chardevs.write(&device, data, format)?,
        Command::RingbufRead { device, size, format } => {
            return Ok(Return::Text(vm.chardevs.read(&device, size, format)?));
        }
        Command::NbdServerStart(asked) => exports::start(vm, asked).await?,
        Command::NbdServerStop => exports::stop(vm).await?,
        Command::NbdServerAdd(asked) => exports::add_to_server(vm, asked).await?,
        Command::NbdServerRemove { name, mode } => exports::delete(vm, &name, mode.unwrap_or_default()).await?,
        Command::BlockExportAdd(asked) => exports::add(vm, asked).await?,
        Command::BlockExportDel { id, mode } => exports::delete(vm, &id, mode.unwrap_or_default()).await?,
        Command::QueryBlockExports => return Ok(Return::BlockExports(exports::list(vm))),
        Command::BlockdevAdd(new) => blockdev::add(vm, new).await?,
        Command::BlockdevDel { node_name } => blockdev::delete(vm, &node_name).await?,
        Command::BlockdevReopen { options } => blockdev::reopen(vm, options).await?,
        Command::BlockPasswd {
            device,
            node_name,
            password,
        } => passwords::set(vm, device.as_deref(), node_name.as_deref(), password).await?,
        Command::DeviceAdd(new) => frontends::add(vm, &new).await?,
        Command::DeviceDel { id } => frontends::delete(vm, &id).await?,
        Command::Eject { device, id, .. } => media::eject(vm, device.as_deref(), id.as_deref()).await?,
        Command::BlockdevOpenTray { device, id, .. } => {
            media::open_tray(vm, device.as_deref(), id.as_deref()).await?;
        }
        Command::BlockdevCloseTray { device, id } => {
            media::close_tray(vm, device.as_deref(), id.as_deref()).await?;
        }
        Command::BlockdevInsertMedium { id, node_name } => media::insert(vm, &id, &node_name).await?,
        Command::BlockdevRemoveMedium { id } => media::remove(vm, &id).await?,
        Command::QueryBlock => return block_info::blocks(vm).await.map(Return::Blocks),
        Command::QueryNamedBlockNodes { flat } => {
            return block_info::nodes(vm, flat.unwrap_or(false))
                .await
                .map(Return::BlockNodes);
        }
        Command::QueryBlockstats { query_nodes } => {
            return block_info::stats(vm, query_nodes.unwrap_or(false))
                .await
                .map(Return::BlockStats);
        }
        Command::BlockResize {
            device,
            node_name,
            size,
        } => resize::resize(vm, device.as_deref(), node_name.as_deref(), size).await?,
        Command::DebugBitmapSha256(of) => return bitmaps::sha256(vm, &of).await.map(Return::BitmapSha256),
        Command::BlockDirtyBitmapAdd(asked) => bitmaps::alone(vm, &Action::BlockDirtyBitmapAdd(asked)).await?,
        Command::BlockDirtyBitmapRemove(asked) => bitmaps::alone(vm, &Action::BlockDirtyBitmapRemove(asked)).await?,
        Command::BlockDirtyBitmapClear(asked) => bitmaps::alone(vm, &Action::BlockDirtyBitmapClear(asked)).await?,
        Command::BlockDirtyBitmapEnable(asked) => bitmaps::alone(vm, &Action::BlockDirtyBitmapEnable(asked)).await?,
        Command::BlockDirtyBitmapDisable(asked) => bitmaps::alone(vm, &Action::BlockDirtyBitmapDisable(asked)).await?,
        Command::BlockDirtyBitmapMerge(asked) => bitmaps::alone(vm, &Action::BlockDirtyBitmapMerge(asked)).await?,
        Command::BlockdevSnapshotSync(asked) => {
            snapshots::transaction(vm, &[Action::BlockdevSnapshotSync(asked)], false).await?;
        }
        Command::BlockdevSnapshot(asked) => {
            snapshots::transaction(vm, &[Action::BlockdevSnapshot(asked)], false).await?;
        }
        Command::BlockdevSnapshotInternalSync(asked) => {
            snapshots::transaction(vm, &[Action::BlockdevSnapshotInternalSync(asked)], false).await?;
        }
        Command::BlockdevSnapshotDeleteInternalSync { device, id, name } => {
            return snapshots::delete_internal(vm, device, id, name)
                .await
                .map(Return::Snapshot);
        }
        Command::Transaction { actions, properties } => {
            let mode = properties.and_then(|properties| properties.completion_mode);
            snapshots::transaction(vm, &actions, mode == Some(CompletionMode::Grouped)).await?;
        }
        Command::BlockSetIoThrottle(asked) => throttling::set(vm, &asked).await?,
        Command::BlockSetWriteThreshold {
            node_name,
            write_threshold,
        } => image_header::set_write_threshold(vm, &node_name, write_threshold).await?,
        Command::ChangeBackingFile {
            device,
            image_node_name,
            backing_file,
        } => image_header::change_backing_file(vm, &device, &image_node_name, backing_file).await?,
        Command::JobCancel { id } => jobs::cancel(vm, &id, true)?,
        Command::JobFinalize { id } => jobs::finalize(vm, &id).await?,
        Command::JobDismiss { id } => jobs::dismiss(vm, &id)?,
        Command::JobPause { id } => jobs::pause(vm, &id)?,
        Command::JobResume { id } => jobs::resume(vm, &id).await?,
        Command::JobComplete { id } => jobs::complete(vm, &id)?,
        Command::QueryJobs => {
            jobs::refresh(vm).await;
            return Ok(Return::Jobs(vm.jobs.borrow().list()));
        }
        Command::QueryBlockJobs => return Ok(Return::BlockJobs(jobs::list(vm).await)),
        Command::BlockJobCancel { device, force } => {
            jobs::cancel(vm, block_job(vm, &device)?, force.unwrap_or(false))?;
        }
        Command::BlockJobComplete { device } => jobs::complete(vm, block_job(vm, &device)?)?,
        Command::BlockJobSetSpeed { device, speed } => {
            jobs::set_speed(vm, block_job(vm, &device)?, speed).await?;
        }
        Command::BlockJobPause { device } => jobs::pause(vm, block_job(vm, &device)?)?,
        Command::BlockJobResume { device } => jobs::resume(vm, block_job(vm, &device)?).await?,
        Command::BlockJobFinalize { id } => jobs::finalize(vm, block_job(vm, &id)?).await?,
        Command::BlockJobDismiss { id } => jobs::dismiss(vm, block_job(vm, &id)?)?,
        Command::BlockJobChange { id, kind, copy_mode } => {
            jobs::change(vm, block_job(vm, &id)?, kind, copy_mode).await?;
        }
        Command::BlockCommit(asked) => jobs::commit::commit(vm, asked).await?,
        Command::BlockStream(asked) => jobs::stream::stream(vm, asked).await?,
        Command::DriveMirror(asked) => jobs::mirror::to_file(vm, asked).await?,
        Command::BlockdevMirror(asked) => jobs::mirror::to_node(vm, asked).await?,
        Command::DriveBackup(asked) => {
            let _turn = vm.graph_change.enter().await;
            jobs::backup::to_file(vm, asked, None).await?;
        }
        Command::BlockdevBackup(asked) => {
            let _turn = vm.graph_change.enter().await;
            jobs::backup::to_node(vm, asked, None).await?;
        }
        Command::RestartHelper {
            role: HelperRole::BlockProc,
        } => return Ok(Return::HelperRestarted(restart::planned(vm).await?)),
        Command::BlockdevCreate { job_id, options } => create::begin(vm, job_id, options)?,
        Command::QueryStatus
        | Command::QueryName
        | Command::QueryKvm
        | Command::QueryCpusFast
        | Command::QueryUuid
        | Command::QueryTarget
        | Command::QueryMachines
        | Command::QueryCurrentMachine
        | Command::QueryIothreads
        | Command::QueryHotpluggableCpus
        | Command::QueryCpuDefinitions
        | Command::QueryMemorySizeSummary
        | Command::QueryMemdev
        | Command::QueryCommandLineOptions { .. }
        | Command::QueryDump
        | Command::QueryDumpGuestMemoryCapability
        | Command::QueryFdsets
        | Command::QueryChardev
        | Command::QueryChardevBackends
        | Command::QomList { .. }
        | Command::QomGet { .. }
        | Command::QomListTypes { .. }
        | Command::QomListProperties { .. }
        | Command::DeviceListProperties { .. } => {
            return answer_at_once(vm, &command).unwrap_or_else(|| Err(QmpError::generic("not a query")));
        }
    }
    Ok(Return::Empty)
}

/// The older commands about jobs know those that work on disks.
fn block_job<'a>(vm: &Vm, id: &'a str) -> Result<&'a str, QmpError> {
    vm.jobs.borrow().check_block_job(id)?;
    Ok(id)
}

/// While the machine changes its state (a reset, say) the interrupt waits, so that the guest that it was meant for gets it.
async fn inject_nmi(vm: &Vm) -> Result<(), QmpError> {
    if vm.config.guest.is_none() {
        return Err(QmpError::generic("machine does not provide NMIs"));
    }
    let _turn = vm.change.enter().await;
    let injected = match vm.vcpu() {
        Ok(vcpu) => vcpu.ask(VcpuRequest::InjectNmi).await.map(drop),
        Err(error) => Err(error),
    };
    injected.map_err(|error| QmpError::generic(error.to_string()))
}

/// query-status.
pub fn status(vm: &Vm) -> StatusInfo {
    let status = vm.state();
    let counts = vm.counters.total();
    StatusInfo {
        running: status == RunState::Running,
        status,
        helper_restarts: Some(counts.restarts).filter(|count| *count > 0),
        policy_violations: Some(counts.violations).filter(|count| *count > 0),
    }
}

/// query-cpus-fast.
pub fn cpus(vm: &Vm) -> Vec<CpuInfoFast> {
    let entry = |(index, thread_id): (usize, &i32)| CpuInfoFast {
        cpu_index: index as i64,
        qom_path: query::cpu_path(index),
        thread_id: i64::from(*thread_id),
        props: query::place(vm.config.topology, index),
        target: query::TARGET.into(),
    };
    vm.vcpu_threads.borrow().iter().enumerate().map(entry).collect()
}
