{{- define "realtide.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "realtide.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "realtide.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "realtide.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "realtide.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ include "realtide.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "realtide.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "realtide.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* The sets as a list of contexts: root, name, fullname, set (what it says over the defaults). */ -}}
{{- define "realtide.sets" -}}
{{- $list := list -}}
{{- range $name, $own := default (dict "main" dict) .Values.engineSets -}}
{{- $set := mergeOverwrite (deepCopy $.Values.defaults) (deepCopy (default dict $own)) -}}
{{- $fullname := printf "%s-%s" (include "realtide.fullname" $) $name | trunc 54 | trimSuffix "-" -}}
{{- $list = append $list (dict "name" $name "fullname" $fullname "set" $set) -}}
{{- end -}}
{{- dict "sets" $list | toJson -}}
{{- end -}}

{{- /* Context: root, name. */ -}}
{{- define "realtide.selector" -}}
app.kubernetes.io/name: {{ include "realtide.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end -}}

{{- /* Context: root, set. */ -}}
{{- define "realtide.image" -}}
{{- $image := mergeOverwrite (deepCopy .root.Values.image) (dict) -}}
{{- range $key, $value := .set.image -}}
{{- if $value -}}{{- $_ := set $image $key $value -}}{{- end -}}
{{- end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- /*
All times of a stop follow from drainSeconds. preStop: time for the cluster to send new streams elsewhere before the server
refuses them, a tenth of the drain between 2 and 15 s. The server then needs drain_seconds and grace_seconds, and
terminationGracePeriodSeconds leaves it 5 s more before it is killed.
*/ -}}
{{- define "realtide.preStopSeconds" -}}
{{- max 2 (min 15 (div (int .drainSeconds) 10)) -}}
{{- end -}}

{{- define "realtide.graceSeconds" -}}
{{- dig "grace_seconds" 2 .config -}}
{{- end -}}

{{- define "realtide.terminationSeconds" -}}
{{- add (int (include "realtide.preStopSeconds" .)) (int .drainSeconds) (ceil (include "realtide.graceSeconds" .)) 5 -}}
{{- end -}}

{{- /* The server's configuration file. Context: root, set. */ -}}
{{- define "realtide.config" -}}
{{- $set := .set -}}
{{- $values := .root.Values -}}
{{- $fixed := dict "port" $values.ports.grpc "admin_port" $values.ports.admin "metrics_port" $values.ports.metrics "drain_seconds" $set.drainSeconds -}}
{{- if $values.tls.secretName -}}
{{- $_ := set $fixed "tls_certificate" "/etc/realtide/tls/tls.crt" -}}
{{- $_ := set $fixed "tls_key" "/etc/realtide/tls/tls.key" -}}
{{- if $values.tls.clientCA -}}{{- $_ := set $fixed "tls_client_ca" "/etc/realtide/tls/ca.crt" -}}{{- end -}}
{{- end -}}
{{- if $values.apiKeys.secretName -}}
{{- $_ := set $fixed "api_key_file" (printf "/etc/realtide/keys/%s" $values.apiKeys.key) -}}
{{- end -}}
{{- $root := ternary "/opt/realtide/models" $set.modelVolume.mountPath (eq $set.modelVolume.source "image") -}}
{{- $models := list -}}
{{- range $set.models -}}
{{- if kindIs "string" . -}}
{{- $models = append $models (dict "bundle" (ternary . (printf "%s/%s" $root .) (hasPrefix "/" .))) -}}
{{- else -}}
{{- $models = append $models (mergeOverwrite (deepCopy .) (dict "bundle" (ternary .bundle (printf "%s/%s" $root .bundle) (hasPrefix "/" .bundle)))) -}}
{{- end -}}
{{- end -}}
{{- if not $models -}}{{- $models = list (dict "bundle" $root) -}}{{- end -}}
{{- $_ := set $fixed "models" $models -}}
{{- mergeOverwrite (dict "log_format" "json") (deepCopy $set.config) $fixed | toYaml -}}
{{- end -}}

{{- /*
A probe. Context: root, service, period, timeout, failures. Before Kubernetes 1.24 there are no gRPC probes, and those that
start a program are dearer: they come less often.
*/ -}}
{{- define "realtide.probe" -}}
{{- if semverCompare ">=1.24-0" .root.Capabilities.KubeVersion.Version -}}
grpc:
  port: {{ .root.Values.ports.admin }}
  {{- with .service }}
  service: {{ . }}
  {{- end }}
periodSeconds: {{ .period }}
timeoutSeconds: {{ .timeout }}
{{- else -}}
exec:
  command: [python, -m, realtide.server.probe, --address, {{ printf "127.0.0.1:%v" .root.Values.ports.admin | quote }}{{ with .service }}, --service, {{ . }}{{ end }}]
periodSeconds: {{ max 5 .period }}
timeoutSeconds: 5
{{- end }}
failureThreshold: {{ .failures }}
{{- end -}}

{{- define "realtide.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "realtide.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
